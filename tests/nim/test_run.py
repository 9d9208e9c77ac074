"""What a run says of itself: the command that makes it again, and the card of its model."""

import dataclasses
import shlex
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console

from denim.cli import main
from denim.nim import Autoencoder, FinetuneConfig, LinearProbeConfig, PretrainConfig, finetune, pretrain
from denim.nim.run import FREE_SETTINGS, command_line
from denim.nim.saving import latest_checkpoint

QUIET = Console(quiet=True)
FAST = {
    "data": "digits", "epochs": 1, "warmup_epochs": 0, "batch_size": 256, "base_lr": 2e-3, "crop_scale": None,
    "flip": False, "device": "cpu",
}  # fmt: skip


def parsed(command, monkeypatch):
    """The settings that `denim` reads off a command."""
    found = []
    for trainer in ("denim.nim.pretrain", "denim.nim.finetuning.finetune"):
        monkeypatch.setattr(trainer, found.append)
    main(shlex.split(command)[1:])
    return found.pop()


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(out=Path("/home/me/run")),
        PretrainConfig(out=Path("x"), preset="micro", sigma="uniform:0,150", crop_scale=(0.5, 1.0), ema=0.999, **{
            name: value for name, value in FAST.items() if name != "crop_scale"
        }),
        LinearProbeConfig(out=Path("x"), denoiser="tiny", mixup=0.5, **FAST),
        FinetuneConfig(out=Path("x"), denoiser="a run/model", trained_on="clean", auto_augment=None, mixup=0.0, **FAST),
    ],
)  # fmt: skip
def test_a_command_has_every_setting_that_is_no_default(config, monkeypatch):
    free = {"workers": 3, "log_every": 7, "micro_batch": 16, "resume": True}
    command = command_line(dataclasses.replace(config, **free))
    assert parsed(command, monkeypatch) == dataclasses.replace(config, out=Path("RUN"))
    assert not any(f"--{name.replace('_', '-')} " in command for name in FREE_SETTINGS if name != "out")


@pytest.mark.slow
def test_the_cards_of_a_run_say_what_made_the_model(tmp_path):
    settings = {**FAST, "preset": "micro", "target": "raw", "sigma": "uniform:0,150"}
    pretrain(PretrainConfig(out=tmp_path / "nim", **settings), QUIET)
    for folder in (tmp_path / "nim" / "model", latest_checkpoint(tmp_path / "nim")):
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        assert card.data.license is None
        for words in (
            "objective nim, target raw.",
            "Noise levels of the training, in 0-255 pixel levels: uniform:0,150.",
            "Trained on digits/train, 1,197 images; 1 epochs in batches of 256, learning rate 0.002.",
            "denim pretrain --out RUN --epochs 1 --warmup-epochs 0 --batch-size 256 --base-lr 0.002 --crop-scale None "
            "--no-flip --device cpu --preset micro --target raw --sigma uniform:0,150\n",
        ):
            assert words in card.text
    tuning = {**FAST, "denoiser": tmp_path / "nim", "drop_path": 0.0, "trained_on": "clean"}
    finetune(FinetuneConfig(out=tmp_path / "ft", **tuning), QUIET)
    card = huggingface_hub.ModelCard.load(tmp_path / "ft" / "model" / "README.md")
    assert 'images of the kind "clean".' in card.text
    assert "in 0-255 pixel levels: none." in card.text
    assert f"--denoiser {tmp_path / 'nim'} --trained-on clean" in card.text

    # Who loads the model and saves it elsewhere, or pushes it, keeps the card.
    model = Autoencoder.from_pretrained(tmp_path / "nim")
    model.save_pretrained(tmp_path / "copy")
    text = (tmp_path / "nim" / "model" / "README.md").read_text()
    assert (tmp_path / "copy" / "README.md").read_text() == text
    licensed = model.generate_model_card(license="mit")
    assert licensed.data.license == "mit"
    assert licensed.text == huggingface_hub.ModelCard(text).text
    assert "uniform" not in str(model.generate_model_card(sigma="70"))
