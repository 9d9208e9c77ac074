"""The Triton kernels of `attack_step` and `attack_start`: their source in the interpreter."""

import math

import pytest
import torch

from denim.kernels import Stream, attack_start, attack_step, noise_words
from denim.kernels.noise import philox

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

# (Threads of a program, elements of a thread) of the kernel, whose module this process must not import.
CONFIGURATIONS = ((128, 8), (256, 8), (512, 8))
# Name: shape, dtypes of pixels, origin and gradient, step size and epsilon per sample. Blocks have 1,024 elements.
CASES = {
    "float32": ((3, 3, 16, 16), torch.float32, torch.float32, torch.float32, True, True),
    "several blocks, the last of one element": ((2, 2049), torch.float32, torch.float32, torch.float32, True, False),
    "odd": ((3, 3, 5, 7), torch.float32, torch.float32, torch.float32, False, True),
    "one block exactly": ((2, 1024), torch.float32, torch.float32, torch.float32, False, False),
    "one sample": ((1, 1, 9, 9), torch.float32, torch.float32, torch.float32, True, True),
    "vector": ((5,), torch.float32, torch.float32, torch.float32, True, True),
    "float16": ((2, 3, 7, 9), torch.float16, torch.float16, torch.float16, True, True),
    "bfloat16": ((2, 3, 7, 9), torch.bfloat16, torch.bfloat16, torch.bfloat16, True, True),
    "mixed": ((2, 3, 7, 9), torch.float32, torch.float16, torch.bfloat16, False, True),
    "mixed, bfloat16 pixels": ((2, 1500), torch.bfloat16, torch.float32, torch.float16, True, False),
    "float64 sizes": ((2, 700), torch.float32, torch.float32, torch.float32, "float64", "float64"),
    "strided": ((2, 8, 6, 3), torch.float32, torch.float32, torch.float32, "strided", True),
    "no sample": ((0, 3, 4, 4), torch.float32, torch.float32, torch.float32, True, False),
    "empty samples": ((2, 3, 0, 4), torch.float32, torch.float32, torch.float32, True, False),
}
# Name: shape, dtype, epsilon.
STARTS = {
    "float32": ((3, 3, 16, 16), torch.float32, True),
    "several blocks, the last of one element": ((2, 2049), torch.float32, False),
    "odd": ((3, 3, 5, 7), torch.float32, True),
    "one block exactly": ((2, 1024), torch.float32, False),
    "one sample": ((1, 1, 9, 9), torch.float32, True),
    "vector": ((5,), torch.float32, True),
    "float16": ((2, 3, 7, 9), torch.float16, True),
    "bfloat16": ((2, 1500), torch.bfloat16, True),
    "float64 epsilon": ((2, 700), torch.float32, "float64"),
    "strided": ((2, 8, 6, 3), torch.float32, "strided"),
    "no sample": ((0, 3, 4, 4), torch.float32, True),
    "empty samples": ((2, 3, 0, 4), torch.float32, True),
    "large": ((1, 400_000), torch.float32, False),
}
# Shapes of more than 2^31 elements, or of more than 2^32 groups of four elements.
HUGE = {"long samples": (2, 2**31 + 3), "many samples": (2**30 + 2, 3), "a very long sample": (1, 2**34 + 3)}
# Its word 12 is 2^32 - 32.
NEXT_TO_ONE = 5082525
DISPATCH = {
    "Triton": (torch.float32, torch.bfloat16, 1),
    "float64 pixels": (torch.float64, torch.float32, 0),
    "float64 gradient": (torch.float32, torch.float64, 0),
}


def _size(kind, batch, largest) -> torch.Tensor:
    if kind is False:
        return torch.tensor(largest / 2)
    sizes = torch.linspace(-largest / 3, largest, batch, dtype=torch.float64)
    if kind == "float64":
        return sizes
    return sizes.float().repeat_interleave(2)[::2] if kind == "strided" else sizes.float()


def _arguments(shape, pixels, origin, gradient, step_size, epsilon) -> tuple:
    generator = torch.Generator().manual_seed(len(shape))
    # Moved by up to 0.2 from the origin, with radii up to 0.1 and steps up to 0.3: all branches of the clamp are taken.
    clean = torch.rand(shape, generator=generator)
    moved = (clean + 0.4 * (torch.rand(shape, generator=generator) - 0.5)).clamp(0, 1)
    slope = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    slope.view(-1)[: 4 * len(special) : 4] = special[: len(slope.view(-1)[: 4 * len(special) : 4])]
    if slope.numel():
        moved.view(-1)[-1], clean.view(-1)[-2] = float("nan"), float("nan")
    tensors = [moved.to(pixels), clean.to(origin), slope.to(gradient)]
    if step_size == "strided":
        tensors = [tensor.movedim(-1, 1) for tensor in tensors]
    return (*tensors, _size(step_size, shape[0], 0.3), _size(epsilon, shape[0], 0.1))


def _start_arguments(shape, dtype, epsilon) -> tuple:
    generator = torch.Generator().manual_seed(len(shape))
    # Radii up to 0.4, both signs: many points leave [0, 1] on either side.
    pixels = torch.rand(shape, generator=generator).to(dtype)
    if pixels.numel():
        pixels.view(-1)[-1] = float("nan")
    seeds = torch.tensor([-(2**63), 2**63 - 1, 5, 2**40 + 3, -1])[: shape[0]]
    if epsilon == "strided":
        pixels, seeds = pixels.movedim(-1, 1), seeds.repeat_interleave(2)[::2]
    return pixels, seeds, _size(epsilon, shape[0], 0.4)


def _stored(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:  # the interpreter truncates float32 instead of rounding it
        exact = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return exact.to(dtype)


def _expected(pixels, origin, gradient, step_size, epsilon) -> torch.Tensor:
    """The operator on the CPU in float32, which `test_attack_step.py` compares with the definition in float64."""
    moved = attack_step(pixels.float(), origin.float(), gradient.float(), step_size=step_size, epsilon=epsilon)
    return _stored(moved, pixels.dtype)


@pytest.fixture(scope="module")
def given() -> dict:
    dispatch = {
        name: _arguments((2, 3, 4, 4), pixels, torch.float32, gradient, True, False)
        for name, (pixels, gradient, _) in DISPATCH.items()
    }
    steps = {name: _arguments(*case) for name, case in CASES.items()}
    starts = {("start", name): _start_arguments(*case) for name, case in STARTS.items()}
    dispatch |= {
        ("start", name): (dispatch[name][0], torch.tensor([3, -4]), torch.tensor(0.1))
        for name in ("Triton", "float64 pixels")
    }
    starts["start", "next to one"] = (torch.zeros(1, 13), torch.tensor([NEXT_TO_ONE]), torch.tensor(1.0))
    # Above the ball, below it, within; and NaN.
    ends = [torch.tensor(end).half() for end in ([0.9, 0.25, 0.75], [0.5, 0.6, 0.7], [3.0, -2.0, math.nan])]
    sizes = (torch.tensor(0.05), torch.tensor(0.1))
    seeds = torch.tensor([2**40 + 5])
    huge = {name: ("attack_step", "attack_step_kernel", shape, ends, sizes) for name, shape in HUGE.items()}
    huge |= {
        ("start", name): ("attack_start", "attack_start_kernel", shape, ends[:1], (seeds.expand(shape[0]), sizes[1]))
        for name, shape in HUGE.items()
    }
    return {"launch": steps | starts, "dispatch": dispatch, "huge": huge}


@pytest.fixture(scope="module")
def interpreted(given, tmp_path_factory, run_script) -> dict:
    folder = tmp_path_factory.mktemp("interpreter")
    calls = {
        part: {name: ("attack_start" if "start" in name else "attack_step", case) for name, case in cases.items()}
        for part, cases in given.items()
        if part != "huge"
    }
    calls["huge"] = given["huge"]
    calls["launch"] |= {
        ("configuration", *configuration): ("attack_step", given["launch"]["odd"], {"configurations": [configuration]})
        for configuration in CONFIGURATIONS
    }
    torch.save(calls, folder / "given.pt")
    run_script("kernels/interpreter_attack_decode.py", folder / "given.pt", folder / "got.pt")
    return torch.load(folder / "got.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_exactly(given, interpreted, name):
    expected, moved = _expected(*given["launch"][name]), interpreted["launch"][name]
    assert moved.is_contiguous()
    # The product is plus or minus the step size, exactly, so a fused multiply-add gives the reference's bits.
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_result_does_not_depend_on_the_configuration(given, interpreted, configuration):
    moved = interpreted["launch"]["configuration", *configuration]
    torch.testing.assert_close(moved, _expected(*given["launch"]["odd"]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*STARTS, "next to one"])
def test_start_equals_the_reference_exactly(given, interpreted, name):
    pixels, seeds, epsilon = given["launch"]["start", name]
    moved = interpreted["launch"]["start", name]
    assert moved.is_contiguous()
    # Every operation of the kernel rounds as the reference does.
    expected = _stored(attack_start(pixels.float(), seeds, epsilon=epsilon), pixels.dtype)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)
    assert moved.isnan().sum() == pixels.isnan().sum()


def test_start_cases_see_every_kind_of_word(given):
    """The reference rounds words in float64, the kernel in float32: the bits agree."""
    _, seeds, _ = given["launch"]["start", "large"]
    words = noise_words(seeds, 400_000, Stream.START)
    for low, high in ((0, 2**16), (2**16, 2**24), (2**24, 2**25), (2**32 - 2**17, 2**32)):
        assert ((words >= low) & (words < high)).any()
    # Words half way between two float32, where the added 1/2 decides the rounding.
    assert ((words >= 2**31) & (words % 2**8 == 2**7)).any()
    # Words that round to one and are then clamped below it.
    words = noise_words(torch.tensor([NEXT_TO_ONE]), 13, Stream.START)
    assert words[0, 12] >= 2**32 - 2**7


@pytest.mark.parametrize("name", HUGE)
def test_the_end_of_tensors_beyond_int32(given, interpreted, name):
    *_, shape, (pixels, origin, gradient), (step_size, epsilon) = given["huge"][name]
    moved = attack_step(*(end[None] for end in (pixels, origin, gradient)), step_size=step_size, epsilon=epsilon)
    torch.testing.assert_close(interpreted["huge"][name][None], moved, rtol=0, atol=0, equal_nan=True)

    *_, (seeds, epsilon) = given["huge"]["start", name]
    positions = math.prod(shape[1:]) - 3 + torch.arange(3)
    groups, seed = positions // 4, seeds[0]
    counter = (groups & 0xFFFFFFFF, groups >> 32, torch.full_like(groups, Stream.START), torch.zeros_like(groups))
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))[positions % 4, torch.arange(3)]
    uniform = ((words.double() + 0.5) / 2**32).float()
    start = (pixels.float() + epsilon * (2 * uniform - 1)).clamp(0, 1).half()
    assert torch.equal(interpreted["huge"]["start", name], start)


def test_nan_stays_nan_and_nothing_else_becomes_it(given, interpreted):
    pixels, origin, gradient, *_ = given["launch"]["float32"]
    broken = pixels.isnan() | origin.isnan() | gradient.isnan()
    assert broken.sum() == 3
    assert torch.equal(interpreted["launch"]["float32"].isnan(), broken)


@pytest.mark.parametrize("name", DISPATCH)
def test_cuda_kernel_serves_what_it_can_and_the_reference_the_rest(given, interpreted, name):
    pixels, origin, gradient, step_size, epsilon = given["dispatch"][name]
    moved, launches = interpreted["dispatch"][name]
    assert launches == DISPATCH[name][2]
    expected = attack_step(pixels, origin, gradient, step_size=step_size, epsilon=epsilon)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["Triton", "float64 pixels"])
def test_cuda_kernel_of_the_start_serves_what_it_can_and_the_reference_the_rest(given, interpreted, name):
    pixels, seeds, epsilon = given["dispatch"]["start", name]
    moved, launches = interpreted["dispatch"]["start", name]
    assert launches == DISPATCH[name][2]
    torch.testing.assert_close(moved, attack_start(pixels, seeds, epsilon=epsilon), rtol=0, atol=0, equal_nan=True)
