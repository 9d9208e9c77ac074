from __future__ import annotations

import json

import pytest

from denim.benchmarks import evaluation_cost
from denim.nim import Autoencoder, Classifier, ClassifierConfig, preset


@pytest.mark.slow
def test_the_cost_is_that_of_the_attack_and_the_draws(tmp_path, capsys):
    config = preset("micro")
    Autoencoder(config).save_pretrained(tmp_path / "denoiser")
    Classifier(ClassifierConfig.for_encoder(config, 10)).save_pretrained(tmp_path / "classifier")
    folders = [str(tmp_path / part) for part in ("denoiser", "classifier")]
    options = ["--images", "3", "--score-draws", "4", "--sigmas", "35"]
    evaluation_cost.main([*folders, "pgd:4/255,steps=2,eot=3,loss=dlr,full", *options])
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["score draws"]) == (3, 4)
    assert report["images with gradients"] == 3 * 2 * (3 + 1)  # three draws of the noise, and the classifier alone
    assert report["passes with gradients"] == 2 * 2
    assert set(report["mean"]) == {
        f"{row} | {attack}"
        for row in ("off", "sigma 35")
        for attack in ("none", "pgd:4/255,steps=2,eot=3,loss=dlr,full")
    }
    assert all(0 < width <= 0.5 for width in report["half-width"].values())
    assert report["seconds"] > 0
