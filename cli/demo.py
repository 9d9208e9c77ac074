"""`denim demo`: the whole path on scikit-learn's digits, in a few minutes on two CPU cores."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path

# No mirroring, since a mirrored digit is not a digit. On so few images augmentation matters more than the schedule.
AUGMENTATION = {"crop_scale": None, "flip": False, "degrees": 15.0, "translate": 0.08, "zoom": 0.12}
FINETUNING = {
    "batch_size": 128,
    "base_lr": 3e-3,
    "layer_decay": 0.9,
    "drop_path": 0.0,
    "auto_augment": None,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
SIGMAS = (0.0, 35.0, 70.0, 105.0, 140.0)
FROZEN = 70.0
MARKER = "demo.json"  # of a finished demo
EPOCHS = {"pretraining": 90, "clean": 45, "denoised": 55}
IMAGES = 500
# The attack of 32/255 leaves the clean classifier no accuracy; that of 96/255 breaks the defense as well.
ATTACKS = ("fgsm:32/255,eot=4", "pgd:32/255,steps=10,eot=4", "pgd:96/255,steps=5,eot=2")


def main(out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Pretrain a small denoiser on digits, fine-tune on denoised images, attack and score the defense, write a report.

    An interrupted demo goes on where it stopped; a finished one starts anew.

    Args:
        out: Folder of the demo.
        seed: Seed of everything random.
    """
    from denim.nim.owner import LOCK_FILE, owned

    content = {entry.name for entry in out.iterdir()} if out.exists() else set()
    is_demo = MARKER in content or (out / "pretraining" / "run.json").exists()
    if content - {LOCK_FILE, "pretraining"} and not is_demo:
        raise ValueError(f"{out} holds something that is no demo; choose another folder with --out")
    with owned(out):
        _demo(out, seed)


def _demo(out: Path, seed: int) -> None:
    from denim.defense import De3, EvaluationSettings, HealthWarning, evaluate, print_table, write_report
    from denim.nim import Autoencoder, Classifier, FinetuneConfig, PretrainConfig, finetune, pretrain
    from denim.nim.data import EvalView, Subset, TorchLoader, open_source
    from denim.nim.files import atomic_write
    from denim.nim.text import open_console, printable

    console = open_console()
    warnings.simplefilter("ignore", HealthWarning)  # the table prints them
    started = time.perf_counter()
    marker = out / MARKER
    if marker.exists():
        for part in ("pretraining", "finetuning-clean", "finetuning-denoised", "evaluation"):
            shutil.rmtree(out / part, ignore_errors=True)
        marker.unlink()
    common = {"data": "digits", "seed": seed, "device": "cpu", "resume": True, "checkpoint_every": 90, **AUGMENTATION}
    pretrain(
        PretrainConfig(
            out=out / "pretraining",
            preset="micro",
            target="raw",
            sigma="uniform:0,150",
            epochs=EPOCHS["pretraining"],
            warmup_epochs=EPOCHS["pretraining"] / 10,
            batch_size=128,
            base_lr=4e-3,
            **common,  # type: ignore[arg-type]
        ),
        console,
    )
    denoiser = out / "pretraining" / "model"
    for trained_on in ("clean", "denoised"):
        finetune(
            FinetuneConfig(
                out=out / f"finetuning-{trained_on}",
                denoiser=denoiser,
                trained_on=trained_on,
                sigma="uniform:0,100",
                epochs=EPOCHS[trained_on],
                warmup_epochs=EPOCHS[trained_on] / 10,
                **common,  # type: ignore[arg-type]
                **FINETUNING,  # type: ignore[arg-type]
            ),
            console,
        )
    trained = time.perf_counter()

    autoencoder = Autoencoder.from_pretrained(denoiser).requires_grad_(False)
    clean = Classifier.from_pretrained(out / "finetuning-clean" / "model")
    model = Classifier.from_pretrained(out / "finetuning-denoised" / "model")
    defenses = {"clean classifier": De3(None, clean, None), "fine-tuned, defense off": De3(None, model, None)}
    for sigma in SIGMAS:
        defenses[f"De3, sigma {sigma:g}"] = De3(autoencoder, model, sigma, seed=seed)
    defenses[f"De3, sigma {FROZEN:g}, frozen"] = De3(autoencoder, model, FROZEN, seed=seed).frozen(seed)
    source = Subset(open_source("digits", "test"), IMAGES)
    loader = TorchLoader(source, EvalView(16), len(source), shuffle=False)
    settings = EvaluationSettings(ATTACKS, score_draws=10, seed=seed, health_images=8)
    evaluation = evaluate(defenses, loader, settings, out / "evaluation", classes=source.classes, console=console)
    report = write_report(
        evaluation,
        out / "evaluation",
        title=f"De3 on digits, {len(source)} test images",
        command="denim demo",
        data="digits",
    )
    finished = time.perf_counter()
    with atomic_write(marker) as staged:
        times = {"training_seconds": trained - started, "evaluation_seconds": finished - trained}
        staged.write_text(json.dumps(times, indent=2) + "\n")
    print_table(evaluation, console)
    console.print(
        f"training {trained - started:.0f} s, evaluation {finished - trained:.0f} s\n"
        f"report: {printable(report.resolve())}",
        soft_wrap=True,
    )
