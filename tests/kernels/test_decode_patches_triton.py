"""The Triton kernels of `decode_patches` in the interpreter: what holds beside the cases of `test_interpreted.py`."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks.case import BACKWARD, FORWARD
from denim.benchmarks.cases import DecodePatches

pytestmark = pytest.mark.slow

NAN = float("nan")


@pytest.fixture(scope="module")
def ends(interpret) -> dict:
    """Predictions whose pixels (mean and std of one half) are exactly 0, 1 and 0.5, outside of [0, 1], or NaN."""
    prediction = torch.tensor([-1.0, 1.0, -1.5, 1.5, 0.0, NAN, -1.0, 1.0]).repeat(2).reshape(1, 1, 16)
    grad = torch.tensor([1.0, 1.0, float("inf"), NAN, 1.0, 1.0, -1.0, -1.0]).repeat(2).reshape(1, 1, 4, 4)
    statistics = (4, [0.5], [0.5], "raw")
    forward = (prediction, None, None, 4, *statistics[:1], *statistics[:1], *statistics[1:], [], [], torch.float32)
    case = DecodePatches(patch=4, channels=1)
    return interpret(
        launch={
            FORWARD: (case, FORWARD, forward, {}),
            BACKWARD: (case, BACKWARD, (grad, prediction, None, None, *statistics, [], False), {}),
        }
    )["launch"]


def test_ends_of_the_clamp_and_nan(ends):
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, NAN, 0.0, 1.0]).repeat(2)
    torch.testing.assert_close(ends[FORWARD].flatten(), expected, rtol=0, atol=0, equal_nan=True)
    # 1 at both ends; 0 outside, even for an infinite gradient; 0 where the pixel is NaN.
    gradient, _ = ends[BACKWARD]
    assert gradient.flatten().tolist() == [0.5, 0.5, 0.0, 0.0, 0.5, 0.0, -0.5, -0.5] * 2


def test_rows_that_32_bits_do_not_hold_are_copied():
    kernel = pytest.importorskip("denim.kernels.decode_patches_triton")
    for stride, described in ((2**31 - 8, (0, 2**31 - 8)), (2**31, (0, 5))):
        prediction = torch.empty_strided((2, 5, 12), (stride * 12, 12, 1), device="meta")
        base, *_, (first, distance, _, _, _) = kernel._arguments(prediction, None, None, [0.5] * 3, [0.5] * 3, "raw")
        assert (first, distance) == described
        assert base.is_contiguous() == (distance == 5)
