"""Every case of every operation: the Triton source in the interpreter against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks.case import expected
from denim.benchmarks.cases import CASES


def name(case) -> str:
    return f"{case.operation}, {case.name}"


@pytest.fixture
def assert_stored(stored):
    def check(got: torch.Tensor, exact: torch.Tensor, error: torch.Tensor | float) -> None:
        """`got` is a value within `error` of `exact`, in its dtype; NaN where that is NaN and nowhere else."""
        assert got.shape == exact.shape
        assert got.is_contiguous()
        lowest, highest = stored(exact - error, got.dtype), stored(exact + error, got.dtype)
        assert (((lowest <= got) & (got <= highest)) | (got.isnan() & exact.isnan())).all()

    return check


@pytest.mark.parametrize("case", CASES, ids=name)
def test_result_and_gradients_equal_the_definition(interpreted, assert_stored, case):
    _, inputs, upstream, result, gradients = interpreted(case.operation)[case.name]
    exact, errors = expected(case, inputs, upstream)
    assert_stored(result, exact[0], errors[0])
    reference = case.fused(**inputs)
    assert (result.dtype, result.shape) == (reference.dtype, reference.shape)
    for leaf, gradient, value, error in zip(case.leaves, gradients, exact[1:], errors[1:], strict=False):
        assert gradient.dtype == inputs[leaf].dtype
        assert_stored(gradient, value, error)
    # A source whose gradient nobody wants gets none.
    assert all(gradient.numel() == 0 for gradient in gradients[len(case.leaves) :])


@pytest.mark.parametrize("case", [case for case in CASES if case.bitwise], ids=name)
def test_bits_equal_the_reference(interpreted, stored, case):
    """Every operation of these kernels rounds where the reference rounds in float32."""
    _, inputs, _, result, _ = interpreted(case.operation)[case.name]
    floats = {name: inputs[name].float() for name in ("pixels", "origin", "gradient") if name in inputs}
    expected = stored(case.fused(**inputs | floats), result.dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
