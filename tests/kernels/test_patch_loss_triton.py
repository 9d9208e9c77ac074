"""The Triton kernels of `patch_loss` in the interpreter: what holds beside the cases of `test_interpreted.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from denim.benchmarks.case import BACKWARD, FORWARD, expected
from denim.benchmarks.cases import OPERATIONS, PatchLoss

pytestmark = pytest.mark.slow

BLOCK_RUNS = (32, 128, 256)
BLOCKS = {patch: PatchLoss(patch=patch, masked=True, grid=(3, 3)) for patch in (16, 4)}
NOTHING = PatchLoss(patch=4, masked=True, batch=1, grid=(1, 2))
STRIDED = PatchLoss(grid=(3, 3))
AGAIN = [dataclasses.replace(case, what="") for case in OPERATIONS["patch_loss"] if case.masked and case.patch > 2]


def jobs_of(key, case, inputs, **options) -> dict:
    """Forward and backward of a case on given inputs."""
    upstream = torch.tensor(-3.5)
    return {
        (key, FORWARD): (case, FORWARD, case.arguments(inputs), options),
        (key, BACKWARD): (case, BACKWARD, case.backward_arguments(inputs, upstream), options),
    }


@pytest.fixture(scope="module")
def launched(interpret) -> dict:
    jobs = {}
    for patch, case in BLOCKS.items():
        for runs in BLOCK_RUNS:
            jobs |= jobs_of((patch, runs), case, case.inputs("cpu"), block_runs=runs)
    nothing = NOTHING.inputs("cpu")
    jobs |= jobs_of("nothing", NOTHING, nothing | {"mask": torch.zeros_like(nothing["mask"])})
    strided = STRIDED.inputs("cpu")
    strided["prediction"] = strided["prediction"].mT.contiguous().mT
    jobs |= jobs_of("strided", STRIDED, strided)
    for number in (1, 2):
        for case in AGAIN:
            jobs |= jobs_of((number, case.name), case, case.inputs("cpu"))
    return interpret(launch=jobs)["launch"]


def assert_equals_definition(case, loss, gradient, assert_stored) -> None:
    inputs = case.inputs("cpu")
    exact, errors = expected(case, inputs, torch.tensor(-3.5))
    assert_stored(loss, exact[0], errors[0])
    assert_stored(gradient, exact[1], errors[1])


def test_a_mask_that_selects_nothing_gives_nan(launched):
    assert launched["nothing", FORWARD].isnan()


def test_a_strided_prediction(launched, assert_stored):
    assert_equals_definition(STRIDED, launched["strided", FORWARD], launched["strided", BACKWARD], assert_stored)


@pytest.mark.parametrize("case", AGAIN, ids=lambda case: case.name)
def test_two_runs_give_the_same_bits(launched, case):
    for part in (FORWARD, BACKWARD):
        assert torch.equal(launched[(1, case.name), part], launched[(2, case.name), part])


@pytest.mark.parametrize("patch", BLOCKS)
def test_a_block_changes_no_more_than_the_order_of_the_sum(launched, assert_stored, patch):
    gradients = [launched[(patch, runs), BACKWARD] for runs in BLOCK_RUNS]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    losses = torch.stack([launched[(patch, runs), FORWARD] for runs in BLOCK_RUNS])
    # The losses of 18 patches have the same bits for every block size. Each addition of them rounds once.
    assert losses.max() - losses.min() <= 18 * 2.0**-24 * losses.max()
    for loss, gradient in zip(losses, gradients, strict=True):
        assert_equals_definition(BLOCKS[patch], loss, gradient, assert_stored)
