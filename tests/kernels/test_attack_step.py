from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denim.benchmarks.baselines import linf_start, linf_step
from denim.kernels import Stream, attack_start, attack_step, noise_words, patches


def reference(pixels, origin, gradient, step_size, epsilon):
    """The baseline in float64. A NaN gradient gives NaN, where torch's sign gives 0."""
    sizes = {
        name: torch.as_tensor(size, dtype=torch.float64)
        for name, size in (("step_size", step_size), ("epsilon", epsilon))
    }
    moved = linf_step(pixels.double(), origin.double(), gradient.double(), **sizes)
    return moved.masked_fill(gradient.isnan(), float("nan"))


def make(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator, dtype=torch.float64)
    pixels = (origin + 0.1 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient.view(-1)[0] = 0
    return pixels.to(dtype), origin.to(dtype), gradient.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 3, 8, 12), (4, 5), (6,)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_plain_computation(shape, dtype, per_sample, global_rng_untouched):
    pixels, origin, gradient = make(shape, dtype)
    step_size, epsilon = 2 / 255, 8 / 255
    if per_sample:
        step_size, epsilon = (torch.linspace(0, high, shape[0]) for high in (0.1, 0.06))
    moved = attack_step(pixels, origin, gradient, step_size=step_size, epsilon=epsilon)
    assert moved.dtype == dtype
    assert moved.is_contiguous()
    # Computed in float32 (four roundings of numbers below 2) or float64, then rounded once to the dtype. A Python float
    # becomes float32 unless the pixels are float64.
    tolerance = 1e-15 if dtype == torch.float64 else 4 * 2**-24 + torch.finfo(dtype).eps / 2
    expected = reference(pixels, origin, gradient, step_size, epsilon)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradient_may_have_another_dtype(dtype):
    pixels, origin, gradient = make((2, 3, 4, 4))
    moved = attack_step(pixels, origin, gradient.to(dtype), step_size=0.01, epsilon=0.03)
    assert torch.equal(moved, attack_step(pixels, origin, gradient, step_size=0.01, epsilon=0.03))


sizes = st.floats(0, 1, width=32)


@pytest.mark.slow
@given(
    values=st.lists(st.tuples(sizes, sizes, st.floats(width=32), sizes), min_size=1, max_size=12),
    step_size=st.floats(-2, 2, width=32),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@settings(max_examples=300, deadline=None)
def test_every_iterate_stays_in_the_ball_and_in_range(values, step_size, dtype):
    pixels, origin, gradient, epsilon = torch.tensor(values, dtype=torch.float64).T.to(dtype)
    moved = attack_step(pixels, origin, gradient, step_size=step_size, epsilon=epsilon.float())
    broken = gradient.isnan()
    assert torch.equal(moved.isnan(), broken)
    kept = moved[~broken]
    assert ((kept >= 0) & (kept <= 1)).all()
    # One rounding of the bound, whose magnitude is at most 1, and one of the result.
    distance = (kept.double() - origin[~broken].double()).abs()
    assert (distance <= epsilon[~broken].float().double() + 2**-25 + torch.finfo(dtype).eps / 2).all()
    # Where neither the ball nor [0, 1] clamps, the pixel moves by exactly one step.
    free = (pixels.double() + step_size * gradient.sign().double())[~broken]
    inside = (free >= 0) & (free <= 1) & ((free - origin[~broken].double()).abs() <= epsilon[~broken].float().double())
    tolerance = 2**-24 + torch.finfo(dtype).eps
    torch.testing.assert_close(kept.double()[inside], free[inside], rtol=0, atol=tolerance)


def test_radius_zero_gives_the_origin():
    pixels, origin, gradient = make((2, 3, 4, 4))
    assert torch.equal(attack_step(pixels, origin, gradient, step_size=0.5, epsilon=0.0), origin)


def test_each_sample_has_its_own_radius_and_step():
    pixels, origin, gradient = make((3, 2, 4, 4))
    step_size, epsilon = torch.tensor([0.01, -0.02, 0.3]), torch.tensor([0.05, 0.0, 0.1])
    moved = attack_step(pixels, origin, gradient, step_size=step_size, epsilon=epsilon)
    for index in range(3):
        alone = (tensor[index : index + 1] for tensor in (pixels, origin, gradient))
        one = attack_step(*alone, step_size=step_size[index].item(), epsilon=epsilon[index])
        assert torch.equal(moved[index : index + 1], one)


def test_strides_change_nothing_and_nothing_is_aliased():
    tensors = make((2, 3, 4, 6))
    moved = attack_step(*tensors, step_size=0.01, epsilon=0.03)
    strided = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    other = attack_step(*strided, step_size=torch.tensor([0.01, 9.0])[:1].expand(2), epsilon=0.03)
    assert torch.equal(other, moved)
    assert other.is_contiguous()
    assert moved.data_ptr() not in [tensor.data_ptr() for tensor in tensors]


def test_gradients_do_not_flow_through():
    pixels, origin, gradient = (tensor.requires_grad_() for tensor in make((2, 3)))
    assert not attack_step(pixels, origin, gradient, step_size=0.01, epsilon=0.03).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "pixels must be floating point"),
        ({"origin": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "origin must be floating point"),
        ({"gradient": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "gradient must be floating point"),
        ({"epsilon": torch.tensor([1, 2])}, TypeError, "epsilon must be floating point"),
        ({"pixels": torch.tensor(0.5)}, ValueError, r"pixels must have shape \(B, ...\)"),
        ({"origin": torch.zeros(3, 4, 4)}, ValueError, r"origin must have the shape of pixels \(2, 3, 4, 4\)"),
        ({"gradient": torch.zeros(1, 3, 4, 4)}, ValueError, r"gradient must have the shape .* got \(1, 3, 4, 4\)"),
        ({"origin": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "origin is on meta and pixels are on cpu"),
        ({"gradient": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "gradient is on meta"),
        ({"epsilon": torch.zeros(2, device="meta")}, ValueError, "epsilon is on meta"),
        ({"epsilon": torch.zeros(3)}, ValueError, r"epsilon must be a scalar or \(2,\), got \(3,\)"),
        ({"step_size": torch.zeros(2, 1)}, ValueError, r"step_size must be a scalar or \(2,\), got \(2, 1\)"),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    good = {name: torch.zeros(2, 3, 4, 4) for name in ("pixels", "origin", "gradient")}
    good |= {"step_size": 0.01, "epsilon": 0.03}
    attack_step(**good)
    with pytest.raises(error, match=message):
        attack_step(**{**good, **changes})


# The random start


def start_of(words, pixels, epsilon):
    """The baseline in float64: u = (word + 1/2) / 2^32."""
    uniform = ((words.double() + 0.5) / 2**32).reshape(pixels.shape)
    return linf_start(pixels.double(), epsilon=torch.as_tensor(epsilon, dtype=torch.float64), uniform=uniform)


SEEDS = torch.tensor([7, -3, 2**63 - 1])
GOLDEN = ["0xf0a90abc", "0x115896b8", "0xbedefe84", "0xb86f45c6", "0x547ade6a"]  # words of seed 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (3, 3, 8, 12), (3, 5), (3,)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_start_is_the_plain_computation(shape, dtype, per_sample, global_rng_untouched):
    pixels, *_ = make(shape, dtype)
    epsilon = torch.linspace(0, 0.9, 3) if per_sample else 8 / 255
    moved = attack_start(pixels, SEEDS, epsilon=epsilon)
    assert moved.dtype == dtype
    assert moved.is_contiguous()
    words = noise_words(SEEDS, pixels[0].numel(), Stream.START)
    # The uniform is rounded to float32 (half a unit in the last place of a number below one) and doubled. In float32,
    # the roundings of difference, product and sum are added, each of a number below two.
    tolerance = 2.0**-23 if dtype == torch.float64 else 5 * 2.0**-24 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(moved.double(), start_of(words, pixels, epsilon), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_never_change(dtype):
    """Bit for bit, so that a published attack can be run again: (pixel + epsilon (2 u - 1)), clamped."""
    pixels = torch.tensor([[0.0, 0.25, 0.5, 1.0, 0.5], [0.0, 0.25, 0.5, 1.0, 0.5]], dtype=dtype)
    moved = attack_start(pixels, torch.tensor([0, 2**40 + 1]), epsilon=0.25)
    # A Python float holds (word + 1/2) / 2^32 exactly, and numpy rounds it once.
    words = noise_words(torch.tensor([0, 2**40 + 1]), 5, Stream.START)
    uniform = torch.tensor([[np.float32((word + 0.5) / 2**32) for word in row] for row in words.tolist()])
    numpy = np.float32 if dtype == torch.float32 else np.float64
    noise = uniform.numpy().astype(numpy)
    expected = (pixels.numpy() + numpy(0.25) * (numpy(2) * noise - numpy(1))).clip(0, 1)
    assert moved.numpy().tobytes() == expected.astype(numpy).tobytes()
    assert [hex(word) for word in words[0].tolist()] == GOLDEN


@given(
    pixels=st.lists(sizes, min_size=1, max_size=9),
    epsilon=st.floats(0, 2, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@settings(max_examples=200, deadline=None)
def test_every_start_lies_in_the_ball_and_in_range(pixels, epsilon, seed, dtype):
    pixels = torch.tensor([pixels], dtype=torch.float64).to(dtype)
    moved = attack_start(pixels, torch.tensor([seed]), epsilon=epsilon)
    assert ((moved >= 0) & (moved <= 1)).all()
    # One rounding of the sum, whose magnitude is at most 3, and one of the result.
    assert ((moved.double() - pixels.double()).abs() <= epsilon + 2**-23 + torch.finfo(dtype).eps / 2).all()


def test_starts_are_uniform_and_symmetric():
    moved = attack_start(torch.full((64, 4096), 0.5), torch.arange(64), epsilon=0.25).double().flatten().sort().values
    # Kolmogorov-Smirnov: sqrt(n) times the distance exceeds 2.2 with probability 2 exp(-2 * 2.2^2) = 1e-4.
    distance = (moved - 0.25) / 0.5 - (torch.arange(len(moved)) + 0.5) / len(moved)
    assert distance.abs().max() * len(moved) ** 0.5 < 2.2


def test_a_start_depends_on_the_seed_alone():
    pixels, *_ = make((3, 2, 4, 4))
    together = attack_start(pixels, SEEDS, epsilon=torch.tensor([0.1, 0.2, 0.0]))
    assert torch.equal(together[2], pixels[2])
    for index in range(2):
        alone = attack_start(pixels[index : index + 1], SEEDS[index : index + 1], epsilon=[0.1, 0.2][index])
        assert torch.equal(alone[0], together[index])
    strided = pixels.contiguous(memory_format=torch.channels_last)
    other = attack_start(strided, SEEDS.repeat_interleave(2)[::2], epsilon=torch.tensor([0.1, 0.2, 0.0]))
    assert torch.equal(other, together)
    assert other.is_contiguous()
    assert not attack_start(pixels.requires_grad_(), SEEDS, epsilon=0.1).requires_grad


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0,)])
def test_empty_batches_and_samples(shape):
    pixels, seeds = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    assert attack_start(pixels, seeds, epsilon=0.1).shape == shape
    assert attack_step(pixels, pixels, pixels, step_size=0.1, epsilon=torch.zeros(shape[0])).shape == shape


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "pixels must be floating point"),
        ({"pixels": torch.tensor(0.5)}, ValueError, r"pixels must have shape \(B, ...\)"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be int64, got torch.float32; derive seeds"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds must have shape \(2,\), got \(3,\)"),
        ({"seeds": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"seeds must have shape \(2,\), got \(1, 2\)"),
        (
            {"seeds": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "seeds are on meta and pixels are on",
        ),
        ({"epsilon": torch.tensor([1, 2])}, TypeError, "epsilon must be floating point"),
        ({"epsilon": torch.zeros(3)}, ValueError, r"epsilon must be a scalar or \(2,\), got \(3,\)"),
        ({"epsilon": torch.zeros(2, device="meta")}, ValueError, "epsilon is on meta"),
    ],
)
def test_bad_input_of_the_start_is_refused(changes, error, message):
    good = {"pixels": torch.zeros(2, 3, 4, 4), "seeds": torch.zeros(2, dtype=torch.int64), "epsilon": 0.03}
    attack_start(**good)
    with pytest.raises(error, match=message):
        attack_start(**{**good, **changes})


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_do_not_depend_on_the_chunk(monkeypatch, per_sample):
    pixels, origin, gradient = make((5, 3, 4, 7))
    sizes = torch.linspace(0.01, 0.05, 5, dtype=pixels.dtype) if per_sample else 0.02
    results = []
    for chunk in (1, 2 * 84, 2**17):
        monkeypatch.setattr(patches, "CHUNK", chunk)
        results.append(attack_step(pixels, origin, gradient, step_size=sizes, epsilon=sizes))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_an_origin_a_little_outside_moves_no_pixel_out():
    # De3 accepts pixels up to 1e-4 outside of [0, 1].
    origin = torch.tensor([[-1e-4, 1 + 1e-4]])
    moved = attack_step(origin, origin, torch.tensor([[-1.0, 1.0]]), step_size=1e-5, epsilon=1e-5)
    assert moved.tolist() == [[0.0, 1.0]]
