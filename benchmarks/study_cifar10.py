"""The study of docs/study-cifar10.md: `python -m denim.benchmarks.study_cifar10 --data cifar10`, a day on a CPU core.

Trains every model of the study by the commands of the page, in this order and one at a time, then measures them, then
attacks them. A study that was stopped goes on where it stopped, and a finished model is not trained again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denim.defense import Attack, De3, Evaluation, EvaluationSettings, HealthWarning, Jpeg, evaluate, write_report
from denim.defense.cells import Cell
from denim.defense.report.pictures import MARKERS, PALETTE
from denim.defense.rows import CLEAN
from denim.kernels import Domain, derive_seeds
from denim.nim import Autoencoder, Classifier, add_noise, reconstruct
from denim.nim.data import EvalView, Loader, Source, Subset, open_loader, open_source
from denim.nim.files import atomic_write
from denim.nim.runs import losses
from denim.nim.text import open_console
from denim.nim.validation import psnr

__all__ = [
    "COMMANDS",
    "PROTOCOLS",
    "RADII",
    "ROWS",
    "Row",
    "accuracies",
    "attacked",
    "draw_losses",
    "draw_reconstructions",
    "draw_robustness",
    "main",
    "psnrs",
]

SIGMAS = (0.0, 35.0, 70.0, 105.0, 140.0)
MASK_RATIOS = (0.25, 0.5, 0.75)
SHOWN = (70.0, 0.75)  # noise level and mask ratio of the pictures
RADII = (4, 8)  # in pixel levels
PROTOCOLS = {
    "FGSM": "fgsm:{radius}/255,eot=1",
    "PGD-10": "pgd:{radius}/255,steps=10,eot=1,loss=ce",
    "AutoPGD": "apgd:{radius}/255,steps=50,eot=4",
}
"""Attacks by the names of the page: those of the publication, with one draw for a gradient, then the strong one, which
raises three losses by 200 gradients each."""
STRONG = "AutoPGD"

_TRAINING = "--batch-size 128 --crop-scale None --precision bf16 --workers 0 --checkpoint-minutes 5 --log-every 50"
_PRETRAIN = f"pretrain --preset mini --epochs 12 --warmup-epochs 0.5 --base-lr 2e-3 {_TRAINING}"
_FINETUNE = (
    f"finetune --epochs 5 --warmup-epochs 0.5 --base-lr 2e-3 --layer-decay 0.9 {_TRAINING} --auto-augment None "
    "--erasing 0 --mixup 0 --cutmix 0 --drop-path 0"
)
_LEVELS = "--sigma uniform:0,140"

COMMANDS = {
    "nim-raw": f"{_PRETRAIN} --objective nim --target raw",
    "nim-norm": f"{_PRETRAIN} --objective nim --target norm",
    "mae": f"{_PRETRAIN} --objective mae --target raw",
    "dmae": f"{_PRETRAIN} --objective dmae --target raw",
    "clean": f"{_FINETUNE} --denoiser {{out}}/nim-raw --trained-on clean",
    "noise": f"{_FINETUNE} --denoiser {{out}}/nim-raw --trained-on noisy {_LEVELS}",
    "at": f"{_FINETUNE} --denoiser {{out}}/nim-raw --trained-on clean --adversarial pgd --epsilon 8 --attack-steps 3 "
    "--attack-step-size 4",
    "ft-nim-raw": f"{_FINETUNE} --denoiser {{out}}/nim-raw --trained-on denoised {_LEVELS}",
    "ft-norm-input": f"{_FINETUNE} --denoiser {{out}}/nim-norm --trained-on denoised {_LEVELS} --statistics input",
    "ft-norm-noisy": f"{_FINETUNE} --denoiser {{out}}/nim-norm --trained-on denoised {_LEVELS} --statistics noisy",
    "ft-mae": f"{_FINETUNE} --denoiser {{out}}/mae --trained-on denoised --degrade mask --mask-ratio 0.75 --sigma 0",
    "ft-dmae": f"{_FINETUNE} --denoiser {{out}}/dmae --trained-on denoised --degrade both --mask-ratio 0.75 {_LEVELS}",
}
"""Commands of `denim` by the name of the run that they make, without --data and --out; {out} is the study's folder."""


@dataclass(frozen=True)
class Row:
    """A defense of the study, at all its levels.

    Attributes:
        name: in tables and pictures.
        classifier: its run.
        denoiser: its run; None for none.
        degrade: see `De3`.
        statistics: see `De3`.
        dials: noise levels or, for "mask", mask ratios; none for a classifier without a defense.
        jpeg: quality of JPEG before the classifier; None for none.
    """

    name: str
    classifier: str
    denoiser: str | None = None
    degrade: str = "noise"
    statistics: str = "input"
    dials: tuple[float, ...] = ()
    jpeg: int | None = None

    def settings(self, dial: float) -> dict[str, Any]:
        """Arguments of `De3` for a noise level or a mask ratio."""
        level = {"sigma": 0.0, "mask_ratio": dial} if self.degrade == "mask" else {"sigma": dial}
        return {"degrade": self.degrade, "statistics": self.statistics, **level}


ROWS = (
    Row("clean classifier", "clean"),
    Row("JPEG, quality 75", "clean", jpeg=75),
    Row("adversarial training", "at"),
    Row("noise alone", "noise", dials=SIGMAS[1:]),
    Row("NIM, raw target", "ft-nim-raw", "nim-raw", dials=SIGMAS),
    Row("NIM, normalised target", "ft-norm-input", "nim-norm", dials=SIGMAS),
    Row("NIM, normalised target, noisy statistics", "ft-norm-noisy", "nim-norm", statistics="noisy", dials=SIGMAS),
    Row("DMAE, 75 % hidden", "ft-dmae", "dmae", degrade="both", dials=SIGMAS),
    Row("MAE, share hidden", "ft-mae", "mae", degrade="mask", dials=MASK_RATIOS),
)


def main(
    data: str,
    out: Path = Path("runs/study"),
    num_images: int = 1000,
    score_draws: int = 8,
    attacked_images: int = 100,
    precision: str = "bf16",
) -> None:
    """Train the models that are missing, then write tables.md, robustness.md and pictures.

    Args:
        data: CIFAR-10, as cifar10 or a folder with train/ and test/.
        out: Folder of the study: the runs, and what is measured.
        num_images: Test images that are measured.
        score_draws: Draws of noise per image for an accuracy.
        attacked_images: Test images that are attacked; 0 attacks none.
        precision: Of attacks and of the scores of attacked images; see `denim evaluate`.
    """
    warnings.simplefilter("ignore", HealthWarning)  # the report has them
    for name, options in COMMANDS.items():
        run = out / name
        if (run / "model" / "config.json").exists():
            continue
        command, *rest = options.format(out=out).split()
        begun = [command, "--resume", str(run)]
        new = [command, "--out", str(run), "--data", data, *rest]
        arguments = begun if (run / "run.json").exists() else new
        _denim(arguments)
    source = open_source(data, "test", 3)
    lines = ["PSNR in dB", "", *_table(psnrs(out, source, num_images)), "", "Accuracy in %", ""]
    lines += _table(accuracies(out, source, num_images, score_draws))
    with atomic_write(out / "tables.md") as staged:
        staged.write_text("\n".join(lines) + "\n")
    draw_losses(out)
    draw_reconstructions(out, source)
    print("\n".join(lines))
    if attacked_images:
        cells = attacked(out, source, attacked_images, score_draws, precision)
        rows = {
            row if level == "off" else f"{row}, {level}": {name: f"{value:.1f}" for name, value in means.items()}
            for (row, level), means in _means(cells).items()
        }
        lines = ["Mean accuracy in %", "", *_table(rows)]
        with atomic_write(out / "robustness.md") as staged:
            staged.write_text("\n".join(lines) + "\n")
        draw_robustness(out, cells)
        print("\n".join(lines))


def psnrs(out: Path, source: Source, num_images: int) -> dict[str, dict[str, str]]:
    """Mean PSNR of reconstructed test images in dB, by row and dial.

    Args:
        out: folder of the study.
        source: test images.
        num_images: how many of them; which depends on a seed.
    """
    found: dict[str, dict[str, str]] = {}
    for row in _with_denoisers():
        model = _denoiser(out, row)
        sums = {_dial(row, dial): 0.0 for dial in row.dials}
        for pixels, ids in _batches(source, num_images, _size(model)):
            for dial in row.dials:
                rebuilt = _reconstructed(model, row, dial, pixels, ids)
                sums[_dial(row, dial)] += float(psnr(rebuilt, pixels).double().sum())
        found[row.name] = {dial: f"{total / num_images:.1f}" for dial, total in sums.items()}
    return found


def accuracies(out: Path, source: Source, num_images: int, score_draws: int) -> dict[str, dict[str, str]]:
    """Accuracy on test images that are not attacked, in % with a 95 % interval, by row and dial.

    Args:
        out: folder of the study; the evaluation lies in `out`/clean-accuracy.
        source: test images.
        num_images: how many of them; which depends on a seed.
        score_draws: draws of noise for each.
    """
    defenses, places = _defenses(out)
    settings = EvaluationSettings((), score_draws=score_draws, examples=0)
    found: dict[str, dict[str, str]] = {}
    for cell in _evaluated(defenses, source, num_images, settings, out / "clean-accuracy").cells:
        row, level = places[cell.defense]
        found.setdefault(row, {})[level] = str(cell.scores.mean)
    return found


def attacked(
    out: Path, source: Source, num_images: int, score_draws: int, precision: str
) -> dict[tuple[str, str, bool], dict[str, Cell]]:
    """Every defense under `PROTOCOLS` at `RADII`, random and frozen; writes the report of `out`/robustness.

    Args:
        out: folder of the study; the evaluation lies in `out`/robustness.
        source: test images.
        num_images: how many of them; which depends on a seed.
        score_draws: draws of noise for each.
        precision: see `EvaluationSettings`.

    Returns:
        Cells by the text form of the attack, those by row, dial ("off" for none) and whether the noise is frozen.
    """
    defenses, places = _defenses(out)
    frozen = {
        f"{name}, frozen": defense.frozen(0)
        for name, defense in defenses.items()
        if isinstance(defense, De3) and defense.is_random
    }
    attacks = tuple(form.format(radius=radius) for radius in RADII for form in PROTOCOLS.values())
    # The checks of every row would take longer than its attacks.
    settings = EvaluationSettings(attacks, score_draws, precision=precision, health_images=0)
    folder = out / "robustness"
    result = _evaluated({**defenses, **frozen}, source, num_images, settings, folder)
    command = shlex.join(["python", "-m", "denim.benchmarks.study_cifar10", *sys.argv[1:]])
    write_report(result, folder, title="The study of CIFAR-10", command=command, data=f"{source.name}, split test")
    found: dict[tuple[str, str, bool], dict[str, Cell]] = {}
    for cell in result.cells:
        row, level = places[cell.defense.removesuffix(", frozen")]
        found.setdefault((row, level, cell.frozen), {})[cell.attack] = cell
    return found


def _defenses(out: Path) -> tuple[dict[str, De3 | nn.Module], dict[str, tuple[str, str]]]:
    """All of the study by their names, and the row and dial ("off" for none) of each."""
    defenses: dict[str, De3 | nn.Module] = {}
    places: dict[str, tuple[str, str]] = {}
    classifiers = {row.classifier: Classifier.from_pretrained(out / row.classifier).eval() for row in ROWS}
    for row in ROWS:
        classifier = classifiers[row.classifier]
        denoiser = None if row.denoiser is None else _denoiser(out, row)
        off = De3(None, classifier, None, seed=0)
        defenses[row.name] = off if row.jpeg is None else nn.Sequential(Jpeg(row.jpeg), classifier)
        places[row.name] = row.name, "off"
        for dial in row.dials:
            name = f"{row.name}, {_dial(row, dial)}"
            defenses[name] = De3(denoiser, classifier, seed=0, **row.settings(dial))
            places[name] = row.name, _dial(row, dial)
    return defenses, places


def _evaluated(
    defenses: Mapping[str, De3 | nn.Module], source: Source, num_images: int, settings: EvaluationSettings, folder: Path
) -> Evaluation:
    first = next(defense.classifier for defense in defenses.values() if isinstance(defense, De3))
    assert isinstance(first, Classifier)
    loader = _loader(source, num_images, first.config.img_size[0])
    return evaluate(defenses, loader, settings, folder, classes=source.classes, console=open_console())


def _means(cells: Mapping[tuple[str, str, bool], Mapping[str, Cell]]) -> dict[tuple[str, str], dict[str, float]]:
    """Mean accuracies in %, by row and dial, then by the columns of the table; "frozen" is the strong attack again."""
    texts = {
        (protocol, radius): str(Attack.parse(form.format(radius=radius)))
        for radius in RADII
        for protocol, form in PROTOCOLS.items()
    }
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (row, level, is_frozen), own in cells.items():
        if is_frozen:
            continue
        known = cells.get((row, level, True))
        means = found[row, level] = {"clean": own[CLEAN].scores.mean.value}
        for (protocol, radius), text in texts.items():
            means[f"{protocol}, {radius}/255"] = own[text].scores.mean.value
            if protocol == STRONG and known is not None:
                means[f"frozen, {radius}/255"] = known[text].scores.mean.value
    return {place: {name: 100 * value for name, value in means.items()} for place, means in found.items()}


def draw_robustness(out: Path, cells: Mapping[tuple[str, str, bool], Mapping[str, Cell]]) -> Path:
    """Write robustness.png: accuracy under attack over clean accuracy, a line through the dials of every row.

    Each line has a colour of its own. Rows without a dial are points, which are black.
    """
    means = _means(cells)
    lines = [row.name for row in ROWS if row.dials]
    colours = {row.name: PALETTE[0] for row in ROWS} | dict(zip(lines, PALETTE[1:], strict=True))
    columns = ["PGD-10", STRONG, "frozen"]
    figure, axes = _figure(len(RADII), len(columns), (11, 7))
    for line, radius in zip(axes, RADII, strict=True):
        for axis, column in zip(line, columns, strict=True):
            for number, row in enumerate(ROWS):
                own = [means[row.name, _dial(row, dial)] for dial in row.dials] or [means[row.name, "off"]]
                name = f"{column}, {radius}/255"
                points = [(x["clean"], x.get(name, x[f"{STRONG}, {radius}/255"])) for x in own]
                look = {"color": colours[row.name], "marker": MARKERS[number]}
                axis.plot(*zip(*points, strict=True), linewidth=1.2, markersize=4, label=row.name, **look)
            axis.set_title(f"{STRONG}, noise known" if column == "frozen" else column, fontsize=10)
            axis.set_xlabel("clean accuracy, %")
            axis.set_ylabel(f"accuracy at {radius}/255, %")
            axis.set_ylim(bottom=-2)
            axis.grid(linewidth=0.5, alpha=0.4)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return _saved(figure, out / "robustness.png")


def draw_losses(out: Path) -> Path:
    """Write losses.png: the training loss of every run over its epochs, pretrainings beside fine-tunings."""
    panels = {"pretraining (losses differ in kind)": "pretrain", "fine-tuning": "finetune"}
    figure, axes = _figure(1, 2, (10, 4))
    for axis, (title, command) in zip(axes[0], panels.items(), strict=True):
        for name, options in COMMANDS.items():
            if options.startswith(command):
                lines = losses(out / name)
                axis.plot([x["epoch"] for x in lines], [x["loss"] for x in lines], linewidth=1.2, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss")
        axis.set_yscale("log")
        axis.grid(linewidth=0.5, alpha=0.4)
        axis.legend(fontsize=8, loc="upper right")
    return _saved(figure, out / "losses.png")


def draw_reconstructions(out: Path, source: Source, num_images: int = 5) -> Path:
    """Write reconstructions.png: test images as every denoiser rebuilds them from the same noise or the same mask."""
    size = _size(_denoiser(out, _with_denoisers()[0]))
    pixels, ids = next(_batches(source, num_images, size))
    level = torch.full((len(pixels),), SHOWN[0])
    columns = {"clean": pixels, f"sigma {SHOWN[0]:g}": add_noise(pixels, level, _seeds(ids)).clamp(0, 1)}
    for row in _with_denoisers():
        dial = SHOWN[1] if row.degrade == "mask" else SHOWN[0]
        columns[f"{row.name}\n{_dial(row, dial)}"] = _reconstructed(_denoiser(out, row), row, dial, pixels, ids)
    figure, axes = _figure(num_images, len(columns), (1.5 * len(columns), 1.5 * num_images + 0.6))
    for place, (title, images) in enumerate(columns.items()):
        axes[0][place].set_title(title.replace(", ", "\n"), fontsize=8)
        for axis, image in zip(axes[:, place], images, strict=True):
            axis.set_axis_off()
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    return _saved(figure, out / "reconstructions.png")


def _denim(arguments: list[str]) -> None:
    print("denim", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "denim.cli", *arguments], check=True)


def _with_denoisers() -> list[Row]:
    return [row for row in ROWS if row.denoiser is not None]


def _denoiser(out: Path, row: Row) -> Autoencoder:
    return Autoencoder.from_pretrained(out / str(row.denoiser)).requires_grad_(False).eval()


def _size(model: Autoencoder) -> int:
    return int(model.config.img_size[0])


def _dial(row: Row, dial: float) -> str:
    return f"{100 * dial:.0f} % hidden" if row.degrade == "mask" else f"sigma {dial:g}"


def _loader(source: Source, num_images: int, size: int) -> Loader:
    return open_loader(
        Subset(source, num_images, 0), EvalView(size), min(200, num_images), shuffle=False, last="keep", workers=0
    )


def _batches(source: Source, num_images: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels (B, C, H, W) in [0, 1] and sample ids."""
    for batch in _loader(source, num_images, size).epoch(0):
        yield batch.images.permute(0, 3, 1, 2) / 255, batch.ids


def _seeds(ids: Tensor) -> Tensor:
    return derive_seeds(0, Domain.VALIDATION, ids)


@torch.no_grad()
def _reconstructed(model: Autoencoder, row: Row, dial: float, pixels: Tensor, ids: Tensor) -> Tensor:
    settings = row.settings(dial)
    sigma = settings.pop("sigma")
    levels = None if row.degrade == "mask" else torch.full((len(pixels),), sigma)
    return reconstruct(model, pixels, levels, _seeds(ids), **settings)


def _table(rows: dict[str, dict[str, str]]) -> list[str]:
    """Lines of Markdown: a column for each dial of any row."""
    # The order of the longest row: another may lack a column in the middle.
    ordered = sorted(rows.values(), key=len, reverse=True)
    columns = list(dict.fromkeys(dial for row in ordered for dial in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(dial, "") for dial in columns)] for name, row in rows.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _saved(figure: Any, path: Path) -> Path:
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png", dpi=120)
    return path


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
