"""The Triton kernels of `attack_step` and `attack_start` in the interpreter, beside `test_interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from denim.benchmarks.case import FORWARD
from denim.benchmarks.cases import AttackStart, AttackStep
from denim.kernels import Stream, attack_start, attack_step, noise_words
from denim.kernels.noise import philox

pytestmark = pytest.mark.slow

# Shapes whose last element lies beyond 2^31 elements, or whose last group of four beyond 2^32 of them.
HUGE = {"long samples": (2, 2**31 + 3), "many samples": (2**30 + 2, 3), "a very long sample": (1, 2**34 + 3)}
# Its word 12 is 2^32 - 32.
NEXT_TO_ONE = 5082525
# Above the ball, below it, within; and NaN.
ENDS = [torch.tensor(end).half() for end in ([0.9, 0.25, 0.75], [0.5, 0.6, 0.7], [3.0, -2.0, math.nan])]
SIZES = (torch.tensor(0.05), torch.tensor(0.1))
SEED = 2**40 + 5


@pytest.fixture(scope="module")
def ends_of_huge(tmp_path_factory, run_script) -> dict:
    pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
    folder = tmp_path_factory.mktemp("interpreter")
    jobs = {name: (AttackStep(), shape, ENDS, SIZES) for name, shape in HUGE.items()}
    for name, shape in HUGE.items():
        seeds = torch.tensor([SEED]).expand(shape[0])
        jobs["start", name] = (AttackStart(), shape, ENDS[:1], (seeds, SIZES[1]))
    torch.save(jobs, folder / "given.pt")
    run_script("kernels/interpreter_attack_step.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


@pytest.mark.parametrize("name", HUGE)
def test_the_end_of_tensors_beyond_int32(ends_of_huge, name):
    step_size, epsilon = SIZES
    moved = attack_step(*(end[None] for end in ENDS), step_size=step_size, epsilon=epsilon)
    torch.testing.assert_close(ends_of_huge[name][None], moved, rtol=0, atol=0, equal_nan=True)

    positions = math.prod(HUGE[name][1:]) - 3 + torch.arange(3)
    groups, seed = positions // 4, torch.tensor(SEED)
    counter = (groups & 0xFFFFFFFF, groups >> 32, torch.full_like(groups, Stream.START), torch.zeros_like(groups))
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))[positions % 4, torch.arange(3)]
    uniform = ((words.double() + 0.5) / 2**32).float()
    start = (ENDS[0].float() + epsilon * (2 * uniform - 1)).clamp(0, 1).half()
    assert torch.equal(ends_of_huge["start", name], start)


def test_a_word_that_rounds_to_one(interpret):
    """It is clamped below one before it is used; the bits are the reference's."""
    pixels, seeds, epsilon = torch.zeros(1, 13), torch.tensor([NEXT_TO_ONE]), torch.tensor(1.0)
    assert noise_words(seeds, 13, Stream.START)[0, 12] >= 2**32 - 2**7
    moved = interpret(launch={0: (AttackStart(), FORWARD, (pixels, seeds, epsilon), {})})["launch"][0]
    assert torch.equal(moved, attack_start(pixels, seeds, epsilon=epsilon))


@pytest.mark.parametrize("threads", [None, 256, 512])
def test_the_result_does_not_depend_on_the_configuration(interpreted, threads):
    """`test_interpreted.py` compares each with the reference, bit for bit; here they are seen to be the same cases."""
    steps = interpreted("attack_step")
    one, other = steps["fp32"], steps["fp32" if threads is None else f"fp32, {threads} threads"]
    for name, value in one.inputs.items():
        torch.testing.assert_close(value, other.inputs[name], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(one.result, other.result, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_nan_and_nothing_else_becomes_it(interpreted):
    _, inputs, _, moved, _ = interpreted("attack_step")["fp32"]
    broken = inputs["pixels"].isnan() | inputs["origin"].isnan() | inputs["gradient"].isnan()
    assert broken.sum() == 3
    assert torch.equal(moved.isnan(), broken)
