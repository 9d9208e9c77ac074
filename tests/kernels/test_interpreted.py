"""Every case of every operation: the Triton source in the interpreter against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks.case import BACKWARD, FORWARD, expected, share_of_error
from denim.benchmarks.cases import (
    CASES,
    AttackStart,
    AttackStep,
    DecodePatches,
    GeluLinear,
    NoisePatchify,
    NormLinear,
    PatchLoss,
)

pytestmark = pytest.mark.slow


def name(case) -> str:
    return f"{case.operation}, {case.name}"


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


F64 = torch.float64
SMALL = {"patch": 4, "batch": 1, "grid": (1, 1)}
# Whether Triton serves it; the reference serves the rest.
DISPATCH = {
    "noise_patchify": (NoisePatchify(**SMALL), True),
    "noise_patchify, float pixels": (NoisePatchify(pixels="fp32 planes", levels=(2,), **SMALL), True),
    "noise_patchify, float64 patches": (NoisePatchify(pixels="fp32 planes", dtype=F64, **SMALL), False),
    "noise_patchify, float64 pixels": (NoisePatchify(pixels="fp64 planes", **SMALL), False),
    "noise_patchify, 65 channels": (
        NoisePatchify(pixels="fp32 planes", channels=65, **SMALL | {"patch": 2}),
        False,
    ),
    "patch_loss": (PatchLoss(masked=True, **SMALL | {"grid": (1, 2)}), True),
    "patch_loss, float64 prediction": (PatchLoss(dtype=F64, **SMALL), False),
    "patch_loss, float64 pixels": (PatchLoss(pixels="fp64 planes", **SMALL), False),
    "patch_loss, 65 channels": (PatchLoss(channels=65, **SMALL | {"patch": 1}), False),
    "patch_loss, one patch of 256 x 256": (PatchLoss(channels=1, **SMALL | {"patch": 256}), False),
    "decode_patches, raw": (DecodePatches(**SMALL), True),
    "decode_patches, input": (DecodePatches(statistics="input", dtype=torch.bfloat16, levels=(2,), **SMALL), True),
    "decode_patches, noisy": (DecodePatches(statistics="noisy", **SMALL), True),
    "decode_patches, patches": (
        DecodePatches(statistics="noisy", dtype=torch.bfloat16, source=torch.float32, patches=True, **SMALL),
        True,
    ),
    "decode_patches, patches in float64": (
        DecodePatches(statistics="input", pixels="fp32 planes", patches=True, output=F64, **SMALL),
        False,
    ),
    "decode_patches, float64 prediction": (
        DecodePatches(statistics="input", pixels="fp32 planes", dtype=F64, **SMALL),
        False,
    ),
    "decode_patches, float64 source": (DecodePatches(statistics="input", pixels="fp64 planes", **SMALL), False),
    "decode_patches, patch 65": (DecodePatches(channels=1, **SMALL | {"patch": 65}), False),
    "decode_patches, 65 channels": (DecodePatches(channels=65, **SMALL | {"patch": 2}), False),
    "attack_step": (AttackStep(shape=(3, 4, 4), gradient=torch.bfloat16, epsilon="one"), True),
    "attack_step, float64 pixels": (AttackStep(dtype=F64, shape=(3, 4, 4)), False),
    "attack_step, float64 gradient": (AttackStep(shape=(3, 4, 4), gradient=F64), False),
    "attack_start": (AttackStart(shape=(3, 4, 4), epsilon="one"), True),
    "attack_start, float64 pixels": (AttackStart(dtype=F64, shape=(3, 4, 4)), False),
    "norm_linear": (NormLinear(dtype=torch.bfloat16, stream=torch.float32, batch=1), True),
    "norm_linear, float64": (NormLinear(dtype=F64, norm=F64, batch=1), False),
    "norm_linear, 8193 wide": (NormLinear(width=8193, tokens=2, batch=1), False),
    "gelu_linear": (GeluLinear(dtype=torch.bfloat16, batch=1), True),
    "gelu_linear, float64": (GeluLinear(dtype=F64, batch=1), False),
}


@pytest.fixture(scope="module")
def dispatched(interpret) -> dict:
    """{name: (case, inputs, upstream, {pass: (what the operator's CUDA kernel answers, launches of Triton)})}."""
    made, jobs = {}, {}
    for key, (case, _) in DISPATCH.items():
        inputs = case.inputs("cpu")
        upstream = case.upstream(inputs, case.fused(**inputs)) if case.leaves else None
        made[key] = case, inputs, upstream
        jobs[key, FORWARD] = (case.operation, case.arguments(inputs))
        if upstream is not None:
            jobs[key, BACKWARD] = (f"{case.operation}_backward", case.backward_arguments(inputs, upstream))
    answers = interpret(dispatch=jobs)["dispatch"]
    return {
        key: (*given, {part: answer for (name, part), answer in answers.items() if name == key})
        for key, given in made.items()
    }


@pytest.mark.parametrize("key", DISPATCH)
def test_cuda_kernels_serve_what_they_can_and_the_reference_the_rest(dispatched, assert_stored, key):
    case, inputs, upstream, answers = dispatched[key]
    served = DISPATCH[key][1]
    assert {launches for _, launches in answers.values()} == {int(served)}
    assert set(answers) == ({FORWARD, BACKWARD} if case.leaves else {FORWARD})
    got = [answers[FORWARD][0]]
    for result, _ in [answers[BACKWARD]] if BACKWARD in answers else []:
        got += result if isinstance(result, tuple) else [result]
    if served:
        for value, exact, error in zip(got, *expected(case, inputs, upstream), strict=False):
            assert_stored(value, exact, error)
        return
    for value, exact, error in zip(got, *expected(case, inputs, upstream), strict=False):
        assert share_of_error(value, exact, error) <= 1
    if case.operation == "noise_patchify":
        return  # its normals are compiled in this process and eager in the other: they differ in the last bit
    operators = torch.ops.denim
    reference = [getattr(operators, case.operation)(*case.arguments(inputs))]
    if upstream is not None:
        backward = getattr(operators, f"{case.operation}_backward")(*case.backward_arguments(inputs, upstream))
        reference += backward if isinstance(backward, tuple) else [backward]
    for value, other in zip(got, reference, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
