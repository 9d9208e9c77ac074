"""Every example runs as its own command, in an empty folder, with the smallest sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from denim.nim import Autoencoder

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(tmp_path: Path, name: str, *arguments: object) -> str:
    """What the example prints. It draws noise eagerly, by the environment that conftest.py sets."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_short_and_all_tested():
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f'"{path.name}"' in source, f"no test runs {path.name}"


@pytest.mark.slow
def test_de3_before_timm(tmp_path, noise_image):
    for k in range(2):
        noise_image(40, 48, seed=k).save(tmp_path / f"{k}.png")
    attack = "fgsm:8/255,eot=1"
    printed = run(tmp_path, "de3_before_timm.py", "0.png", "1.png", "--classifier", "test_vit", "--attack", attack)
    assert re.fullmatch(
        rf"classifier: [012] of 2 predictions survive {attack}\nDe3: [012] of 2 predictions survive {attack}\n", printed
    )


@pytest.mark.slow
def test_noise_patchify_in_your_model_denoises(tmp_path):
    printed = run(tmp_path, "noise_patchify_in_your_model.py", "--steps", "60", "--batch", "64")
    losses = re.findall(r"step (\d+): squared error ([\d.]+), of the noisy patches ([\d.]+)", printed)
    assert [int(step) for step, _, _ in losses] == [0, 59]
    # sigma 50 in units of std 0.25: an expected squared error of (50 / 255 / 0.25)^2 = 0.615 in every noisy patch.
    assert all(float(noisy) == pytest.approx(0.615, rel=0.05) for _, _, noisy in losses)
    assert float(losses[-1][1]) < 0.8 * float(losses[-1][2])


@pytest.mark.slow
def test_pretrain_on_a_folder_leaves_a_denoiser_and_a_picture(tmp_path, make_folder):
    folder = make_folder(tmp_path / "photos")
    words = (folder, "--out", tmp_path / "run", "--preset", "micro", "--epochs", "1", "--batch", "2")
    printed = run(tmp_path, "pretrain_on_a_folder.py", *words)
    assert str(tmp_path / "run" / "model") in printed
    model = Autoencoder.from_pretrained(tmp_path / "run" / "model")
    assert model.config.channels == 3
    assert model.config.target == "raw"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert Image.open(tmp_path / "run" / "denoised.png").size == (32, 16)
