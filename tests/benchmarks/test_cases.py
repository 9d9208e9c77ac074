"""The table of cases: every row is right on the CPU reference, and fit for the builds and the benchmarks."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from denim.benchmarks import cases
from denim.benchmarks.case import BACKWARD, BOTH, FORWARD, NAMES, double, expected, passes, share_of_error
from denim.benchmarks.cases import CASES, OPERATIONS, DecodePatches


def name(case) -> str:
    return f"{case.operation}, {case.name}"


def upstream_of(case, inputs):
    """A gradient for the result of a case that has leaves."""
    with torch.no_grad():
        return case.upstream(inputs, case.fused(**inputs)) if case.leaves else None


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_reference_equals_the_definition(case, global_rng_untouched):
    inputs = case.inputs("cpu")
    upstream = upstream_of(case, inputs)
    got = passes(case.fused, inputs, case.leaves, upstream)()
    for value, exact, error in zip(got, *expected(case, inputs, upstream), strict=True):
        assert share_of_error(value.detach(), exact, error) <= 1
        assert value.is_contiguous()
    for leaf, gradient in zip(case.leaves, got[1:], strict=True):
        assert gradient.dtype == inputs[leaf].dtype


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_operator_takes_the_arguments_of_the_case(case):
    """So the launchers and the machines that are given these arguments compute what the public operation computes."""
    inputs = case.inputs("cpu")
    result = case.fused(**inputs)
    operator = getattr(torch.ops.denim, case.operation)
    torch.testing.assert_close(operator(*case.arguments(inputs)), result, rtol=0, atol=0, equal_nan=True)
    if BACKWARD not in case.triton_kernels:
        return
    upstream = case.upstream(inputs, result)
    backward = getattr(torch.ops.denim, f"{case.operation}_backward")
    given = backward(*case.backward_arguments(inputs, upstream))
    _, *gradients = passes(case.fused, inputs, case.leaves, upstream)()
    for gradient, other in zip(given if isinstance(given, tuple) else (given,), gradients, strict=False):
        torch.testing.assert_close(gradient, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_chain_gives_what_the_operation_gives_in_kind(case):
    inputs = case.inputs("cpu")
    given = {key: value for key, value in inputs.items() if key != "seeds" or case.operation == "attack_start"}
    with torch.random.fork_rng():
        chain = case.chain(**given, **case.constants("cpu"))
    fused = case.fused(**inputs)
    assert (chain.shape, chain.dtype) == (fused.shape, fused.dtype)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_tensors_without_memory_are_like_those_with(case):
    real, meta = case.inputs("cpu"), case.inputs("meta")
    assert list(real) == list(meta)
    for key, value in real.items():
        assert (value.shape, value.dtype, value.stride()) == (meta[key].shape, meta[key].dtype, meta[key].stride())
        assert meta[key].is_meta


def test_inputs_are_the_same_again():
    for case in CASES:
        for one, other in zip(case.inputs("cpu").values(), case.inputs("cpu").values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_names_tell_cases_apart():
    counts = collections.Counter(map(name, CASES))
    assert [text for text, count in counts.items() if count > 1] == []
    assert sum(map(len, OPERATIONS.values())) == len(CASES)


def test_every_operation_is_built_timed_and_compared():
    for operation, rows in OPERATIONS.items():
        kinds = rows[0].triton_kernels
        assert {part for case in rows for part in case.built} == set(kinds), operation
        if operation != "attack_start":  # one elementwise kernel either way (docs/kernels.md)
            assert any(case.timed for case in rows), operation
            assert any(case.compared for case in rows), operation
        assert all(set(case.timed) <= {FORWARD, BOTH} for case in rows)
        assert all(case.leaves for case in rows if BACKWARD in case.built or BOTH in case.timed)


def test_patch_sizes_channels_and_dtypes_are_covered():
    for operation in ("noise_patchify", "patch_loss", "decode_patches"):
        rows = OPERATIONS[operation]
        assert {2, 4, 8, 14, 16, 32} <= {case.patch for case in rows}
        assert {1, 3, 5} <= {case.channels for case in rows}
        assert set(NAMES) - {torch.float64} <= {case.dtype for case in rows}
        # Bytes, and floats that are contiguous, channels_last or neither.
        memory = {case.pixels.partition(" ")[2] for case in rows}
        assert {"", "planes", "strided"} <= memory
        assert "channels_last" in memory or operation == "decode_patches"  # which makes it contiguous first
    for operation in ("attack_step", "attack_start"):
        assert set(NAMES) - {torch.float64} <= {case.dtype for case in OPERATIONS[operation]}


def test_configurations_are_those_of_the_launchers():
    """Every configuration that is measured on a GPU is built ahead of time."""
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    from denim.kernels import attack_step_triton, noise_patchify_triton

    for part in (FORWARD, BACKWARD):
        built = {case.threads for case in OPERATIONS["noise_patchify"] if part in case.built}
        assert built == {None, *noise_patchify_triton.CONFIGURATIONS[1:]}
    built = {case.threads for case in OPERATIONS["attack_step"] if FORWARD in case.built}
    assert built == {None, *(threads for threads, _ in attack_step_triton.CONFIGURATIONS[1:])}


@pytest.mark.parametrize("case", OPERATIONS["decode_patches"], ids=name)
def test_decoded_pixels_lie_on_both_sides_of_the_clamp(case):
    inputs = case.inputs("cpu")
    if not inputs["prediction"].numel():
        return
    exact = {key: double(value) for key, value in inputs.items()}
    pixels = dataclasses.replace(case, patches=False).definition(**exact)
    assert 0.05 < ((pixels > 0) & (pixels < 1)).double().mean() < 0.95
    _, gradient, *_ = expected(case, inputs, upstream_of(case, inputs))[0]
    assert (gradient != 0).double().mean() > 0.05


def test_upstream_gradients_avoid_the_ends_of_the_clamp():
    """A pixel that rounding may carry over 0 or 1 gets no gradient, in pixels and in patches."""
    flat = DecodePatches(patch=2, grid=(2, 2), batch=1)
    prediction = torch.full((1, 4, 12), 0.3)
    # (0 - mean) / std is a prediction that decodes to 0 exactly.
    prediction[0, 0, 0] = -flat.mean[0] / flat.std[0]
    for patches in (False, True):
        case = dataclasses.replace(flat, patches=patches)
        upstream = case.upstream({"prediction": prediction}, case.fused(prediction=prediction))
        place = (0, 0, 0) if patches else (0, 0, 0, 0)
        assert upstream[place] == 0
        assert (upstream != 0).sum() == upstream.numel() - 1


def test_share_of_the_allowed_error():
    exact = torch.tensor([1.0, -3.0, 0.0, 1e6], dtype=torch.float64)
    assert share_of_error(exact.float(), exact, 0.0) == 0  # nothing allowed, and nothing wrong
    assert share_of_error(exact.half(), exact, 0.0) == 0  # too large for float16 on both sides
    assert share_of_error(exact + 0.5, exact, 1.0) == pytest.approx(0.5)
    # Three units in the last place of a bfloat16 of 1, where half a unit is allowed, and a whole one as error.
    off = torch.tensor([1 + 3 * 2.0**-7], dtype=torch.bfloat16)
    assert share_of_error(off, exact[:1], 2.0**-7) == pytest.approx(2, rel=0.01)
    for wrong in (torch.tensor([1, float("nan"), 0, 1e6]), torch.tensor([float("nan")] * 4), torch.ones(3)):
        assert not share_of_error(wrong, exact, 1e9) <= 1


def test_nan_is_expected_where_the_definition_has_it():
    exact = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert share_of_error(exact.float(), exact, 0.0) == 0
    assert not share_of_error(torch.tensor([1.0, 2.0]), exact, 1e9) <= 1


def test_start_cases_see_every_kind_of_word():
    """The reference rounds words in float64. Where a float32 has not enough bits is what could go wrong."""
    (case,) = (case for case in OPERATIONS["attack_start"] if case.what == "many words")
    words = cases.noise_words(case.inputs("cpu")["seeds"], 400_000, cases.Stream.START)
    for low, high in ((0, 2**16), (2**16, 2**24), (2**24, 2**25), (2**32 - 2**17, 2**32)):
        assert ((words >= low) & (words < high)).any()
    # Half way between two float32, and one half of a word decides.
    assert ((words >= 2**31) & (words % 2**8 == 2**7)).any()
