from __future__ import annotations

import io
import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from denim.cli import compare as command
from denim.defense import De3, EvaluationSettings, compare, evaluate, paired_difference
from denim.defense.comparison import sign_flip_test
from denim.nim.files import DamagedFileError

COUNT = 30
SETTINGS = EvaluationSettings(("fgsm:12/255,eot=2",), score_draws=4, examples=0, health_images=0)


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(64, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layer(pixels.flatten(1))


PIXELS = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = Linear(0)(PIXELS).argmax(dim=1)


def evaluated(
    out: Path, seed: int, images: slice = slice(None), labels: Tensor = LABELS, name: str = "noise"
) -> object:
    """A model that knows the labels, or another one."""
    model = Linear(seed)
    defenses = {"off": De3(None, model, None), name: De3(None, model, 70)}
    return evaluate(defenses, (PIXELS[images], labels[images]), SETTINGS, out, console=Console(file=io.StringIO()))


def test_rows_are_paired_by_image(tmp_path, capsys):
    one, other = evaluated(tmp_path / "one", 0), evaluated(tmp_path / "other", 5, slice(0, 20))
    found = {(row.defense, row.attack): row for row in compare(tmp_path / "one", tmp_path / "other")}
    assert list(found) == [(name, attack) for name in ("off", "noise") for attack in ("none", *SETTINGS.attacks)]
    right = Linear(5)(PIXELS).argmax(dim=1) == LABELS
    row = found["off", "none"]
    differences = 1.0 - right[:20].double().numpy()
    assert (row.num_images, row.first, row.second) == (20, 1.0, float(right[:20].double().mean()))
    assert row.difference == paired_difference(np.ones(20), right[:20].double().numpy())
    assert row.p_value == sign_flip_test(differences) < 0.05
    means = {(cell.defense, cell.attack): cell.scores.mean.value for cell in other.cells}
    assert {place: row.second for place, row in found.items()} == pytest.approx(
        {place: value for place, value in means.items() if place in found}
    )
    assert len(one.cells) == len(other.cells)
    for row in compare(tmp_path / "one", tmp_path / "one"):
        assert (row.num_images, row.difference.value, row.p_value) == (COUNT, 0, 1)
    command.main(tmp_path / "one", tmp_path / "other")
    shown = capsys.readouterr().out
    assert f"{100 * found['off', 'none'].second:.1f}" in shown
    assert f"{found['off', 'none'].p_value:.4f}" in shown


def test_two_defenses_of_one_evaluation(tmp_path, capsys):
    done = evaluated(tmp_path, 0)
    found = compare(tmp_path, defenses=("off", "noise"))
    assert [(row.defense, row.other, row.attack) for row in found] == [
        ("off", "noise", attack) for attack in ("none", *SETTINGS.attacks)
    ]
    means = {(cell.defense, cell.attack): cell.scores.mean.value for cell in done.cells}
    for row in found:
        assert (row.first, row.second) == pytest.approx((means["off", row.attack], means["noise", row.attack]))
        assert row.difference.value == pytest.approx(row.first - row.second)
    twice = compare(tmp_path, tmp_path, ("noise", "off"))
    assert [row.difference.value for row in twice] == [-row.difference.value for row in found]
    command.main(tmp_path, defenses=("off", "noise"))
    shown = "".join(capsys.readouterr().out.split())
    assert "attackimagesfirstsecond" in shown
    assert f"first:offin{tmp_path};second:noisein{tmp_path}." in shown
    with pytest.raises(ValueError, match=r"has no defense 'of', it has off, noise"):
        compare(tmp_path, defenses=("off", "of"))
    with pytest.raises(ValueError, match="is one evaluation: give another one, or the names of two defenses"):
        compare(tmp_path)


def test_the_test_is_exact_for_few_differences_and_that_of_mcnemar():
    assert sign_flip_test([0, 0, 0, 1]) == sign_flip_test([]) == 1
    # 8 and 2 discordant pairs: twice the tail of a fair coin.
    tail = sum(comb(10, k) for k in range(3)) / 2**10
    assert sign_flip_test([1] * 8 + [-1] * 2 + [0] * 50) == pytest.approx(2 * tail, abs=1e-12)
    # With 40 against 20 the resamples have a standard error of 0.001.
    tail = sum(comb(60, k) for k in range(21)) / 2**60
    assert sign_flip_test([1] * 40 + [-1] * 20) == pytest.approx(2 * tail, abs=0.006)


def test_the_test_keeps_its_level():
    generator = np.random.default_rng(3)
    rejected = [sign_flip_test(generator.normal(size=9) * generator.random(9)) < 0.1 for _ in range(300)]
    # 300 coins of 0.1: 30, with a standard deviation of 5.2.
    assert 12 <= sum(rejected) <= 48


def test_folders_that_cannot_be_compared(tmp_path):
    evaluated(tmp_path / "one", 0)
    evaluated(tmp_path / "other name", 0, name="loud")
    evaluated(tmp_path / "relabelled", 0, labels=(LABELS + 1) % 3)
    with pytest.raises(ValueError, match=r"is no finished evaluation: it has no results\.json"):
        compare(tmp_path / "one", tmp_path)
    assert {row.defense for row in compare(tmp_path / "one", tmp_path / "other name")} == {"off"}
    with pytest.raises(ValueError, match=r"30 images have one label in .* such as sample id"):
        compare(tmp_path / "one", tmp_path / "relabelled")
    file = tmp_path / "one" / "results.json"
    whole = json.loads(file.read_text())
    renamed = [{**cell, "defense": "x"} for cell in whole["cells"]]
    file.write_text(json.dumps({**whole, "cells": renamed}))
    with pytest.raises(ValueError, match="no defense under an attack in common: they have x, and off, noise"):
        compare(tmp_path / "one", tmp_path / "relabelled")
    old = [{key: value for key, value in cell.items() if key != "key"} for cell in whole["cells"]]
    file.write_text(json.dumps({**whole, "cells": old}))
    with pytest.raises(ValueError, match="is of an earlier version: the same call of denim evaluate writes it anew"):
        compare(tmp_path / "one", tmp_path / "relabelled")
    file.write_text(json.dumps({**whole, "cells": [{"attack": 3}]}))
    with pytest.raises(DamagedFileError, match="a cell in it is none"):
        compare(tmp_path / "one", tmp_path / "relabelled")
