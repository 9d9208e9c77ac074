from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denim.kernels import attack_step


def reference(pixels, origin, gradient, step_size, epsilon):
    """The docstring's equivalent in float64."""
    pixels, origin, gradient = (tensor.double().numpy() for tensor in (pixels, origin, gradient))

    def column(size):
        size = size.double().numpy() if isinstance(size, torch.Tensor) else np.float64(size)
        return size.reshape(-1, *(1,) * (pixels.ndim - 1)) if size.ndim else size

    moved = pixels + column(step_size) * np.sign(gradient)  # numpy's sign keeps NaN, torch's does not
    moved = origin + (moved - origin).clip(-column(epsilon), column(epsilon))
    return torch.from_numpy(moved.clip(0, 1))


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
    # Computed in float32 (four roundings of numbers below 2) or float64, rounded once into the dtype. A Python float
    # is float32 there unless pixels are float64.
    tolerance = 1e-15 if dtype == torch.float64 else 4 * 2**-24 + torch.finfo(dtype).eps / 2
    expected = reference(pixels, origin, gradient, step_size, epsilon)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradient_may_have_another_dtype(dtype):
    pixels, origin, gradient = make((2, 3, 4, 4))
    moved = attack_step(pixels, origin, gradient.to(dtype), step_size=0.01, epsilon=0.03)
    assert torch.equal(moved, attack_step(pixels, origin, gradient, step_size=0.01, epsilon=0.03))


sizes = st.floats(0, 1, width=32)


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
    # One rounding at magnitude up to 1 of the bound, one of the result.
    distance = (kept.double() - origin[~broken].double()).abs()
    assert (distance <= epsilon[~broken].float().double() + 2**-25 + torch.finfo(dtype).eps / 2).all()
    # Where nothing binds, the step is the step.
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
