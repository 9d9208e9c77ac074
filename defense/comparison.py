"""Two evaluations or two defenses side by side: a paired test, image by image, under every attack that both have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from denim.defense.records import RecordColumns, Records
from denim.defense.scores import Interval, paired_difference
from denim.nim.files import DamagedFileError, read_json

__all__ = ["Comparison", "compare"]

Array = npt.NDArray[Any]
RESAMPLES = 9999
BATCH = 100  # resamples at once, which bounds memory


@dataclass(frozen=True)
class Comparison:
    """One defense in two evaluations, or two defenses, under one attack, on the images that both have.

    Attributes:
        defense: its name in the first evaluation.
        other: its name, or that of the other defense, in the second one.
        attack: text form, or "none".
        num_images: how many images both have.
        first, second: mean accuracies in [0, 1].
        difference: first - second, paired over images.
        p_value: two-sided, of the hypothesis that the sign of each image's difference is a coin; see `sign_flip_test`.
    """

    defense: str
    other: str
    attack: str
    num_images: int
    first: float
    second: float
    difference: Interval
    p_value: float


def compare(first: Path, second: Path | None = None, defenses: tuple[str, str] | None = None) -> tuple[Comparison, ...]:
    """Compare two evaluations, or two defenses, by the records that the results are made of.

    Images are the same if their sample ids are: two models may see one image at two sizes.

    Args:
        first: folder that `evaluate` has written.
        second: likewise; None for the same, of which two defenses are compared.
        defenses: a name in the first evaluation and another one in the second, which are compared. None compares every
            defense with that of the same name.

    Raises:
        ValueError: no results in a folder, or those of an earlier version; no such defense; nothing in common; an image
            has two labels; one folder and no defenses.
        DamagedFileError: a file of a folder is damaged.
    """
    if second is None and defenses is None:
        raise ValueError(f"{first} is one evaluation: give another one, or the names of two defenses to compare")
    second = second or first
    keys = [_keys(folder) for folder in (first, second)]
    for folder, key, name in zip((first, second), keys, defenses or (), strict=False):
        if name not in {defense for defense, _ in key}:
            raise ValueError(f"{folder} has no defense {name!r}, it has {_listed(key)}")
    names = dict([defenses] if defenses else [(name, name) for name, _ in keys[0]])
    shared = [
        ((name, attack), (names[name], attack))
        for name, attack in keys[0]
        if name in names and (names[name], attack) in keys[1]
    ]
    if not shared:
        raise ValueError(
            f"{first} and {second} have no defense under an attack in common: they have "
            f"{_listed(keys[0])}, and {_listed(keys[1])}; rows are the same if their names are"
        )
    found = []
    with Records(first) as ours, Records(second) as theirs:
        for places in shared:
            place = places[0]
            columns = [records.cell(key[at]) for records, key, at in zip((ours, theirs), keys, places, strict=True)]
            shares = [_shares(part) for part in columns]
            ids = sorted(shares[0].keys() & shares[1].keys())
            if len(ids) < 2:
                raise ValueError(f"{first} and {second} share {len(ids)} images under {place}, and a test needs two")
            left, right = (np.array([part[i] for i in ids]) for part in shares)
            if (moved := left[:, 0] != right[:, 0]).any():
                raise ValueError(
                    f"{int(moved.sum())} images have one label in {first} and another in {second}, such as sample id "
                    f"{ids[int(np.argmax(moved))]}: the evaluations are of other data, or of other classes"
                )
            difference = paired_difference(left[:, 1], right[:, 1])
            p_value = sign_flip_test(left[:, 1] - right[:, 1])
            means = float(left[:, 1].mean()), float(right[:, 1].mean())
            found.append(Comparison(place[0], *places[1], len(ids), *means, difference, p_value))
    return tuple(found)


def sign_flip_test(differences: npt.ArrayLike) -> float:
    """Two-sided p-value of paired differences whose signs are coins under the hypothesis.

    By `scipy.stats.permutation_test`: exact up to 13 differences that are not zero, and else of 9999 resamples. Of
    differences of -1, 0 and 1 it is McNemar's test.

    Args:
        differences: float (N,).
    """
    values = np.asarray(differences, np.float64)
    moved = values[values != 0]
    if len(moved) < 2:  # both signs of one difference are as far from zero
        return 1.0
    result = stats.permutation_test(
        (moved,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _keys(folder: Path) -> dict[tuple[str, str], bytes]:
    """By defense and attack, the key of the records that the results of a folder are made of."""
    file = folder / "results.json"
    if not file.exists():
        raise ValueError(f"{folder} is no finished evaluation: it has no results.json")
    keys = {}
    for cell in read_json(file, {"cells": list})["cells"]:
        try:
            place, key = (cell["defense"], cell["attack"]), cell.get("key", "")
            if key is not None:
                keys[place] = bytes.fromhex(key)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{file} is damaged: a cell in it is none ({error!r})") from error
    if not any(keys.values()):
        raise ValueError(
            f"{file} is of an earlier version: the same call of denim evaluate writes it anew, from its records"
        )
    return keys


def _shares(columns: RecordColumns) -> dict[int, tuple[int, float]]:
    """By sample id, the label and the share of right draws; of an image that has changed, those of its last record."""
    right = (columns.predictions == columns.labels[:, None]).mean(axis=1)
    return dict(zip(columns.ids.tolist(), zip(columns.labels.tolist(), right.tolist(), strict=True), strict=True))


def _listed(keys: dict[tuple[str, str], bytes]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in keys))
