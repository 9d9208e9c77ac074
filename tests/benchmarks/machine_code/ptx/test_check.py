"""Every case executed, and every kernel that is built, on three generations of GPUs; the comparison can fail."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks.case import FORWARD
from denim.benchmarks.cases import CASES, AttackStep, NoisePatchify
from denim.benchmarks.machine_code import run_on_cpu
from denim.kernels.dispatch import GPU, triton_on_cpu
from denim.kernels.patches import patchify

WHERE = "Triton is a dependency on Linux x86-64 alone"
pytest.importorskip("triton", reason=WHERE)
check = pytest.importorskip("denim.benchmarks.machine_code.ptx.check", reason=WHERE)

pytestmark = pytest.mark.slow

NAMES = {f"{case.operation}, {case.name}": case for case in CASES}
BUILT = [name for name, case in NAMES.items() if case.built]
# As built; the others in the sizes of the interpreter's tests. As wrong as PTX lets the approximate functions be, once:
# their instructions are the same everywhere.
JOBS = [
    *(check.Job(name, 90) for name in NAMES if name not in BUILT),
    *(check.Job(name, capability, as_built=True) for capability in (80, 90, 100) for name in BUILT),
    *(check.Job(name, 90, as_built=True, approximation=1.0) for name in BUILT),
]


@pytest.fixture(scope="module")
def outcomes() -> dict:
    return check.run_jobs(JOBS)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_compiled_code_computes_the_definition(outcomes, job):
    outcome = outcomes[job]
    assert not outcome.failure
    assert outcome.agreements
    assert [agreement for agreement in outcome.agreements if agreement.outside] == []


NARROW = [
    name
    for name in BUILT
    if NAMES[name].operation == "noise_patchify"
    and NAMES[name].dtype == torch.bfloat16
    and FORWARD in NAMES[name].built
]


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_compared_bit_for_bit(outcomes, name):
    """All bits of nearly all values are determined, so that a value that is cut off instead of rounded lies outside."""
    patches = outcomes[check.Job(name, 90, as_built=True)].agreements[0]
    assert patches.result == "result"
    assert patches.exact > 0.9


@pytest.mark.parametrize("pixels", ["uint8", "bf16 planes"])
def test_clean_patches_are_rounded_once(pixels):
    """pixel * factor + shift with the factors of the reference: exact in float64 for pixels of so few bits."""
    case = NoisePatchify(clean=True, pixels=pixels, patch=4, batch=2, grid=(1, 2))
    images = case.inputs("cpu")["images"]
    with run_on_cpu(90) as launches, triton_on_cpu(GPU("ptx", 32)):
        got = case.fused(images=images)
    assert len(launches) == 1
    full = 255 if pixels == "uint8" else 1
    factor, shift = (
        torch.tensor(values, dtype=torch.float32).double()
        for values in (
            [1 / (full * std) for std in case.std],
            [-mean / std for mean, std in zip(case.mean, case.std, strict=True)],
        )
    )
    nhwc = images if pixels == "uint8" else images.permute(0, 2, 3, 1)
    assert torch.equal(got, patchify((nhwc.double() * factor + shift).float(), 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_wrong_bit_of_one_value_is_seen(dtype):
    exact = torch.linspace(-1, 1, 100, dtype=torch.float64)
    got = exact.to(dtype)
    assert check._compare("result", got, exact, 1e-9).outside == 0
    got[17] *= 1 + torch.finfo(dtype).eps
    assert check._compare("result", got, exact, 1e-9).outside == 1


def test_a_value_that_was_not_written_is_seen():
    exact = torch.linspace(-1, 1, 100, dtype=torch.float64)
    got = exact.float()
    got[3] = float("nan")
    assert check._compare("result", got, exact, 1e-6).outside == 1


class Shortened(AttackStep):
    """A gradient that ends too early, as for a kernel that reads too far."""

    def arguments(self, inputs):
        given = list(super().arguments(inputs))
        given[2] = given[2].as_strided(given[2].shape, (1, *[0] * (given[2].dim() - 1)))
        return tuple(given)


def test_a_case_that_traps_is_reported(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, **options: self)
    outcome = check.run_case(Shortened(), (FORWARD,), 90)
    assert "OutOfBounds" in outcome.failure
    assert "attack_step_kernel" in outcome.failure
    assert not outcome.holds


def test_a_kernel_that_writes_beside_its_output_is_reported(monkeypatch):
    case = NoisePatchify(batch=1, grid=(1, 1), patch=4)
    assert check.run_case(case, (FORWARD,), 90).holds
    guarded = check._guarded

    def touched(made):
        empty = guarded(made)

        def allocate(*shape, **options):
            out = empty(*shape, **options)
            made[-1][1][0] = 0
            return out

        return allocate

    monkeypatch.setattr(check, "_guarded", touched)
    assert check.run_case(case, (FORWARD,), 90).failure == "a kernel wrote beside its output"
