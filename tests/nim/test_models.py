"""Models by name: those that ship with the package, and what a name that is none of them answers."""

import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from denim.kernels import Domain, derive_seeds
from denim.nim import (
    Autoencoder,
    AutoencoderConfig,
    CheckpointError,
    Classifier,
    ClassifierConfig,
    models,
    reconstruct,
)
from denim.nim.checkpoint import find_folder
from denim.nim.models import shipped_models
from denim.nim.warm_start import warm_start

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3), target="raw")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder in place of the package's, with a denoiser "plain"."""
    folder = tmp_path / "models"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "unfinished").mkdir()
    monkeypatch.setattr(models, "FOLDER", folder)
    with torch.random.fork_rng(devices=[]):
        Autoencoder(CONFIG).save_pretrained(folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def download(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_name_stands_for_the_folder_of_that_name(shipped):
    assert shipped_models() == {"plain": shipped / "plain"}
    model = Autoencoder.from_pretrained("plain")
    assert model.config == CONFIG
    with torch.random.fork_rng(devices=[]):
        other = Autoencoder(CONFIG)
    assert warm_start(other, "plain").startswith("weights of plain: encoder and decoder")
    assert torch.equal(other.decoder_pred.weight, model.decoder_pred.weight)
    with pytest.raises(CheckpointError, match=r"plain/config\.json describes a Autoencoder, expected Classifier"):
        Classifier.from_pretrained("plain")


def test_a_folder_comes_before_a_model_that_ships(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    with pytest.raises(CheckpointError, match=r"plain holds no config\.json"):
        Autoencoder.from_pretrained("plain")


@pytest.mark.parametrize("name", ["plan", "owner/plan", "./plan", Path("plain")])
def test_a_name_that_is_none_lists_those_that_ship(shipped, name):
    with torch.random.fork_rng(devices=[]):
        Classifier(ClassifierConfig.for_encoder(CONFIG, 3)).save_pretrained(shipped / "other")
    with pytest.raises(CheckpointError, match=rf"no folder {name}, .*; with Denim ship other, plain$"):
        Autoencoder.from_pretrained(name)


def test_where_none_ships_the_error_says_so(shipped, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(models, "FOLDER", tmp_path / "empty")
    assert shipped_models() == {}
    with pytest.raises(CheckpointError, match=r"no folder plain, .*; no models ship with this version of Denim$"):
        find_folder("plain", [])


def test_what_ships_can_be_loaded_and_has_a_card():
    """Of the package's own folder, whatever it holds."""
    for name, folder in shipped_models().items():
        parts = [path.parent for path in folder.rglob("config.json")]
        assert parts, name
        for part in parts:
            kind = Classifier if '"model": "Classifier"' in (part / "config.json").read_text() else Autoencoder
            kind.from_pretrained(part)
        assert "license:" in (folder / "README.md").read_text(), name


def test_the_denoiser_that_ships_denoises_photos():
    """Parts of two photos that it has not seen, at a level at which the noise alone leaves 11.2 dB."""
    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]
    pixels = torch.stack(photos).permute(0, 3, 1, 2).float() / 255
    tiles = F.interpolate(pixels, size=(128, 192), mode="area").unfold(2, 32, 32).unfold(3, 32, 32)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    model = Autoencoder.from_pretrained("cifar10-tiny")
    seeds = derive_seeds(0, Domain.VALIDATION, torch.arange(len(tiles)))
    with torch.no_grad():
        rebuilt = reconstruct(model, tiles, torch.full((len(tiles),), 70.0), seeds[None])[0]
    psnr = -10 * (rebuilt.clamp(0, 1) - tiles).square().flatten(1).mean(dim=1).log10()
    assert psnr.mean() > 20


def test_files_of_a_model_are_data_of_the_package(shipped):
    """By the patterns of pyproject.toml. `make package-check` compares with the wheel."""
    with torch.random.fork_rng(devices=[]):
        Classifier(ClassifierConfig.for_encoder(CONFIG, 3)).save_pretrained(shipped / "both" / "classifier")
    (shipped / "both" / "de3.json").touch()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["package-dir"]["denim.nim.models"] == "nim/models"
    assert "denim.nim.models" in project["packages"]
    files = [path for name in ("plain", "both") for path in (shipped / name).rglob("*") if path.is_file()]
    taken = {path for pattern in project["package-data"]["denim.nim.models"] for path in shipped.glob(pattern)}
    assert len(files) == 7
    assert taken == set(files)
