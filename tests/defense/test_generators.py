from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from denim.defense.generators import keyed_generators

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def drawn(seed: int) -> tuple[float, float, float]:
    with keyed_generators(seed, CPU):
        return draws()


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("seed", [None, 0, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("fails", [False, True])
def test_generators_are_afterwards_as_before(seed, fails):
    with keyed_generators(None, CPU):
        expected = draws()
    try:
        with keyed_generators(seed, CPU):
            first = draws()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (first == expected) == (seed is None), "without a seed they go on from where they are"
    with keyed_generators(None):
        assert draws() == expected


def test_a_seed_decides_what_all_three_draw():
    one, other = drawn(7), drawn(8)
    assert drawn(7) == one
    assert all(a != b for a, b in zip(one, other, strict=True))
