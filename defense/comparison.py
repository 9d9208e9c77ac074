"""Two evaluations side by side: a paired test, image by image, for every defense under every attack that both have."""

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
    """One defense under one attack in two evaluations, on the images that both have.

    Attributes:
        defense: its name.
        attack: text form, or "none".
        num_images: how many images both have.
        first, second: mean accuracies in [0, 1].
        difference: first - second, paired over images.
        p_value: two-sided, of the hypothesis that the sign of each image's difference is a coin; see `sign_flip_test`.
    """

    defense: str
    attack: str
    num_images: int
    first: float
    second: float
    difference: Interval
    p_value: float


def compare(first: Path, second: Path) -> tuple[Comparison, ...]:
    """Compare two evaluations by the records that their results are made of.

    Images are the same if their sample ids are: two models may see one image at two sizes.

    Args:
        first: folder that `evaluate` has written.
        second: likewise.

    Raises:
        ValueError: no results in a folder, or those of an earlier version; nothing in common; an image has two labels.
        DamagedFileError: a file of a folder is damaged.
    """
    keys = [_keys(folder) for folder in (first, second)]
    shared = [place for place in keys[0] if place in keys[1]]
    if not shared:
        raise ValueError(
            f"{first} and {second} have no defense under an attack in common: they have "
            f"{_listed(keys[0])}, and {_listed(keys[1])}; rows are the same if their names are"
        )
    found = []
    with Records(first) as ours, Records(second) as theirs:
        for place in shared:
            columns = [records.cell(key[place]) for records, key in zip((ours, theirs), keys, strict=True)]
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
            found.append(Comparison(*place, len(ids), *means, difference, p_value))
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
