"""What the README shows must run."""

import re
from pathlib import Path

import pytest
import torch

from denim.cli import COMMANDS
from denim.nim import Autoencoder, Classifier, ClassifierConfig, preset

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(heading):
    """The Python code under a heading: ten lines, beside imports and blank lines."""
    (code,) = re.findall(r"```python\n(.*?)```", README.split(f"## {heading}\n")[1].split("\n## ")[0], re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10
    return code


@pytest.mark.slow
def test_the_library_in_ten_lines_runs(tmp_path):
    code = block("The library in ten lines")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Autoencoder(preset("micro", target="raw"))
        denoiser.save_pretrained(tmp_path / "denoiser")
        config = ClassifierConfig.for_encoder(denoiser.config, 10, trained_on="noise, raw target")
        Classifier(config).save_pretrained(tmp_path / "classifier")
    code = code.replace("runs/demo/pretraining/model", str(tmp_path / "denoiser"))
    code = code.replace("runs/demo/finetuning-denoised/model", str(tmp_path / "classifier"))
    assert "runs/" not in code
    names = {}
    exec(code, names)
    assert names["logits"].shape == (8, 10)
    assert names["curve"].shape == (4, 20, 8, 10)
    assert (names["attacked"] - names["pixels"]).abs().max() <= 8 / 255 + 1e-6


def test_the_kernels_alone_in_ten_lines_run():
    names = {}
    with torch.random.fork_rng():
        exec(block("The kernels alone in ten lines"), names)
    assert names["patches"].shape == (8, 196, 768)
    assert names["loss"].isfinite()
    assert names["model"].weight.grad.abs().sum() > 0


def test_every_command_is_shown_and_exists():
    shown = set(re.findall(r"^    denim (\w+)", README, re.M))
    assert shown == set(COMMANDS)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
