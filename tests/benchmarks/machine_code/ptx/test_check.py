"""Every build case executed, on three generations of GPUs; and that the comparison can fail."""

from __future__ import annotations

import pytest
import torch

WHERE = "Triton is a dependency on Linux x86-64 alone"
pytest.importorskip("triton", reason=WHERE)
check = pytest.importorskip("denim.benchmarks.machine_code.ptx.check", reason=WHERE)
cases = pytest.importorskip("denim.benchmarks.machine_code.cases", reason=WHERE)

NAMES = [case.name for case in cases.CASES]
CAPABILITIES = (80, 90, 100)
# As wrong as PTX lets the approximate functions be, once: their instructions are the same everywhere.
JOBS = [(name, capability, 0.0) for capability in CAPABILITIES for name in NAMES] + [(name, 90, 1.0) for name in NAMES]


@pytest.fixture(scope="module")
def outcomes() -> dict:
    return check.run_cases(JOBS)


@pytest.mark.parametrize(("name", "capability", "approximation"), JOBS)
def test_compiled_code_computes_what_the_operator_does(outcomes, name, capability, approximation):
    outcome = outcomes[name, capability, approximation]
    assert not outcome.failure
    assert outcome.agreements
    for agreement in outcome.agreements:
        assert agreement.holds, agreement


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.rounds], ids=lambda case: case.name)
def test_bfloat16_is_compared_bit_for_bit(outcomes, case):
    """All bits of nearly all values are determined, so that a value that is cut off instead of rounded lies outside."""
    stored = [agreement.exact for agreement in outcomes[case.name, 90, 0.0].agreements]
    assert max(stored) > 0.9


def compared(result: torch.Tensor, images=None) -> check.Agreement:
    """Of a result of `noise_patchify` on images that are all zero, without noise, and -1 in normalised space."""
    images = torch.zeros(1, 4, 4, 1, dtype=torch.uint8) if images is None else images
    arguments = (images, torch.zeros(1), torch.zeros(1, dtype=torch.int64), 2, [0.5], [0.5], result.dtype)
    launcher = next(launcher for launcher in check._LAUNCHERS if "patches" in launcher.results)
    (agreement,) = check._compare(launcher, arguments, result)
    return agreement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_wrong_bit_of_one_value_is_seen(dtype):
    result = torch.full((1, 4, 4), -1.0, dtype=dtype)
    assert compared(result).holds
    result[0, 1, 2] -= torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 64)
    assert not compared(result).holds
    assert compared(result).outside == 1


def test_a_value_that_was_not_written_is_seen():
    result = torch.full((1, 4, 4), -1.0)
    result[0, 0, 0] = float("nan")
    assert compared(result).outside == 1


def test_a_case_that_traps_is_reported(monkeypatch):
    """A tensor that ends too early, as for a kernel that reads too far."""
    case = next(case for case in cases.CASES if case.name == "attack_step, fp32, odd size")
    launch = check.attack_step_triton.launch

    def shortened(pixels, *rest, **options):
        options["configurations"] = ((128, 8),)
        return launch(pixels, rest[0], rest[1].as_strided(rest[1].shape, (1, 1)), *rest[2:], **options)

    monkeypatch.setattr(check.attack_step_triton, "launch", shortened)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, **options: self)
    outcome = check.run_case(case, 90)
    assert "OutOfBounds" in outcome.failure
    assert "attack_step_kernel" in outcome.failure
    assert not outcome.holds
