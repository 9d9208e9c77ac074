"""Where a model or a training set meets a test set, the commands match classes by name, before any work."""

import json

import pytest
import torch

from denim.cli import evaluate as evaluate_command
from denim.cli import finetune as finetune_command
from denim.nim import Autoencoder, Classifier, FinetuneConfig
from denim.nim.autoencoder import preset
from denim.nim.classifier import ClassifierConfig

OPTIONS = {
    "health_images": 0,
    "sigmas": (0.0,),
    "frozen": None,
    "attacks": ("fgsm:1/255,eot=1",),
    "score_draws": 1,
    "loader": "torch",
    "examples": 0,
}


@pytest.fixture
def says_cow(tmp_path):
    """A classifier that takes every picture for a cow."""
    encoder = preset("micro", img_size=16, patch_size=4, channels=3)
    model = Classifier(ClassifierConfig.for_encoder(encoder, 3, classes=("ant", "bee", "cow"), trained_on="noisy"))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fill(noise_image):
    def make(root, counts):
        for name, count in counts.items():
            (root / name).mkdir(parents=True)
            for k in range(count):
                noise_image(16, 16, seed=k).save(root / name / f"{k}.png")

    return make


def test_a_model_and_a_folder(says_cow, tmp_path, fill):
    fill(tmp_path / "set/test", {"ant": 1, "cow": 3})
    with pytest.warns(UserWarning, match="no images of 1 of 3 classes: 'bee'"):
        evaluate_command.main(says_cow, out=tmp_path / "out", data=str(tmp_path / "set"), **OPTIONS)
    cells = json.loads((tmp_path / "out/results.json").read_text())["cells"]
    assert cells[0]["scores"]["mean"]["value"] == 0.75  # by number it would be 0
    fill(tmp_path / "set/test", {"dog": 1})
    with pytest.raises(ValueError, match="not among the 3 expected ones: 'dog'"):
        evaluate_command.main(says_cow, out=tmp_path / "other", data=str(tmp_path / "set"), **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_two_models(says_cow, tmp_path):
    model = Classifier.from_pretrained(says_cow)
    other = Classifier(ClassifierConfig(**{**vars(model.config), "classes": ("bee", "ant", "cow")}))
    other.save_pretrained(tmp_path / "clean")
    with pytest.raises(ValueError, match="do not have the same classes under the same numbers"):
        evaluate_command.main(says_cow, clean_classifier=tmp_path / "clean", out=tmp_path / "out", **OPTIONS)


def test_training_and_test_images(tmp_path, fill, monkeypatch):
    fill(tmp_path / "set/train", {"ant": 1, "cow": 1})
    fill(tmp_path / "set/val", {"ant": 1, "dog": 1})
    monkeypatch.setattr("denim.nim.finetuning.train", lambda *_, **__: pytest.fail("trained"))
    Autoencoder(preset("micro", channels=3)).save_pretrained(tmp_path / "denoiser")
    config = FinetuneConfig(out=tmp_path / "out", denoiser=tmp_path / "denoiser", data=str(tmp_path / "set"))
    with pytest.raises(ValueError, match="val has 1 of 2 classes that are not among the 2 expected ones: 'dog'"):
        finetune_command.main(config)
