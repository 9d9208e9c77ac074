"""Operators under `torch.func` and in forward mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

from denim.kernels import (
    attention,
    attention_kernel,
    decode_patches,
    derive_seeds,
    gelu_linear,
    noise_patchify,
    norm_linear,
    patch_loss,
)
from denim.kernels.seeds import Domain

MEAN, STD = (0.5, 0.4), (0.25, 0.5)
GEOMETRY = {"patch_size": 2, "mean": MEAN, "std": STD}
SIZE = (4, 6)
SEEDS = torch.tensor([[5, -7], [2**40, 11], [12, 13]])
SIGMA = torch.tensor([[20.0, 35.0], [70.0, 140.0]], dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def noisy(images: Tensor) -> Tensor:
    return noise_patchify(images, SIGMA, SEEDS, dtype=torch.float64, **GEOMETRY)


def decoded(statistics: str | None, normalize: bool):
    options = {"img_size": SIZE, "statistics": statistics, **GEOMETRY}
    options["normalize"] = ((0.3, 0.6), (0.5, 0.25)) if normalize else None

    def call(prediction: Tensor, *source: Tensor) -> Tensor:
        sigma = SIGMA[:, None] if statistics == "noisy" else None
        return decode_patches(prediction, source=source[0] if source else None, sigma=sigma, **options)

    return call


def inputs(statistics: str | None) -> tuple[Tensor, ...]:
    # Predictions of which some leave [0, 1], and none comes close to its ends, where the derivative jumps.
    prediction = (rand(2, 3, 2, 6, 8).detach() * 6 - 3).requires_grad_()
    if statistics is None:
        return (prediction,)
    return prediction, rand(2, 2, *SIZE, seed=1) if statistics == "input" else rand(2, 3, 2, 6, 8, seed=2)


STATISTICS = pytest.mark.parametrize("statistics", [None, "input", "noisy"])


def test_derivatives_of_noisy_patches():
    assert gradcheck(noisy, rand(2, 2, *SIZE), check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@STATISTICS
@pytest.mark.parametrize("normalize", [False, True])
def test_derivatives_of_decoded_patches(statistics, normalize):
    options = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    given = inputs(statistics)
    assert gradcheck(decoded(statistics, normalize), given, **options)
    if statistics is not None:  # the gradient of the source alone, and of the prediction alone
        fixed = [value.detach() for value in given]
        assert gradcheck(lambda source: decoded(statistics, normalize)(fixed[0], source), given[1], **options)
        assert gradcheck(lambda prediction: decoded(statistics, normalize)(prediction, fixed[1]), given[0], **options)


def test_the_clamp_stops_the_derivative_where_it_stops_the_gradient():
    prediction = torch.tensor([-9.0, 0.0, 9.0]).double().view(1, 3, 1)
    options = {"img_size": (1, 3), "patch_size": 1, "mean": (0.5,), "std": (0.25,)}
    _, moved = torch.func.jvp(lambda x: decode_patches(x, **options), (prediction,), (torch.ones_like(prediction),))
    assert moved.flatten().tolist() == [0, 0.25, 0]


def test_transformations_of_torch_func_agree_with_autograd():
    images, upstream = rand(2, 2, *SIZE), rand(2, 3, 2, 6, 8, seed=3).detach()

    def loss(x: Tensor) -> Tensor:
        return (noisy(x).sin() * upstream).sum()

    (expected,) = torch.autograd.grad(loss(images), images)
    plain = images.detach()
    torch.testing.assert_close(torch.func.grad(loss)(plain), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(loss)(plain), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(loss)(plain), expected, rtol=0, atol=1e-12)


IMAGES = rand(2, 2, *SIZE).detach()
WEIGHTS = {name: rand(*shape, seed=5).detach() for name, shape in (("norm", (8,)), ("linear", (3, 8)), ("bias", (3,)))}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: patch_loss(x, IMAGES, **GEOMETRY),
        lambda x: norm_linear(x, WEIGHTS["norm"], WEIGHTS["norm"], WEIGHTS["linear"], WEIGHTS["bias"]).sin().sum(),
        lambda x: gelu_linear(x, WEIGHTS["linear"], WEIGHTS["bias"]).sin().sum(),
    ],
    ids=["patch_loss", "norm_linear", "gelu_linear"],
)
def test_operators_of_training_under_torch_func(call):
    given = rand(2, 6, 8)
    (expected,) = torch.autograd.grad(call(given), given)
    torch.testing.assert_close(torch.func.grad(call)(given.detach()), expected, rtol=0, atol=1e-12)
    members = rand(3, 2, 6, 8, seed=4).detach()
    each = torch.stack([torch.func.grad(call)(member) for member in members])
    torch.testing.assert_close(torch.vmap(torch.func.grad(call))(members), each, rtol=0, atol=1e-12)


def test_members_of_vmap_are_computed_like_calls_of_their_own():
    images, seeds = rand(3, 2, 2, *SIZE).detach(), torch.arange(6).view(3, 2)

    def loss(x: Tensor, key: Tensor) -> Tensor:
        patches = noise_patchify(x, SIGMA[0], derive_seeds(1, Domain.ATTACK, key), dtype=torch.float64, **GEOMETRY)
        return decoded("input", False)(patches, x).square().sum()

    for call in (loss, torch.func.grad(loss)):
        expected = torch.stack([call(x, key) for x, key in zip(images, seeds, strict=True)])
        torch.testing.assert_close(torch.vmap(call)(images, seeds), expected, rtol=0, atol=1e-12)
        moved = torch.vmap(call, in_dims=(4, 1))(images.movedim(0, 4), seeds.T)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_what_has_no_derivative_is_refused_and_not_zero():
    images, tangent = rand(1, 2, *SIZE).detach(), torch.ones(1, 2, *SIZE).double()
    with pytest.raises(ValueError, match="not differentiable in sigma"):
        torch.func.jvp(
            lambda level: noise_patchify(images, level, SEEDS[0, :1], **GEOMETRY), (SIGMA[0, :1],), (SIGMA[0, :1],)
        )
    patches = rand(1, 6, 8).detach()
    for transform in (
        lambda: torch.func.jvp(lambda x: patch_loss(x, images, **GEOMETRY), (patches,), (patches,)),
        lambda: torch.func.grad(lambda x: torch.func.grad(lambda y: noisy1(y).sum())(x).sum())(images),
        lambda: torch.func.jvp(lambda x: torch.func.grad(lambda y: noisy1(y).sum())(x), (images,), (tangent,)),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"no derivative|implement the jvp"):
            transform()


def noisy1(images: Tensor) -> Tensor:
    return noise_patchify(images, SIGMA[0, :1], SEEDS[0, :1], dtype=torch.float64, **GEOMETRY).square()


def test_attention_in_forward_mode_takes_a_backend_that_has_it():
    query, tangent = rand(2, 3, 5, 8).detach(), rand(2, 3, 5, 8, seed=1).detach()

    def call(x: Tensor) -> Tensor:
        return attention(x, 2 * x, x + 1)

    step = 1e-6
    expected = (call(query + step * tangent) - call(query - step * tangent)) / (2 * step)
    # Central differences: an error of step^2 and of rounding, 1e-16 / step.
    torch.testing.assert_close(torch.func.jvp(call, (query,), (tangent,))[1], expected, rtol=0, atol=1e-8)
    with forward_ad.dual_level():
        assert attention_kernel(query, query, query) == "math"
    assert attention_kernel(query, query, query) == "sdpa"
