from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denim.defense.attacks.balls import Ball

NORM = pytest.mark.parametrize("norm", ["linf", "l2"])
SEEDS = torch.arange(7)
# Rounding of a sum of 75 squares in float32, relative.
SLACK = 1e-5


def images(channels: int = 3, side: int = 5) -> torch.Tensor:
    return torch.rand(7, channels, side, side, generator=torch.Generator().manual_seed(0))


def distance(norm: str, change: torch.Tensor) -> torch.Tensor:
    flat = change.flatten(1).double()
    return flat.abs().amax(dim=1) if norm == "linf" else flat.square().sum(dim=1).sqrt()


def inside(ball: Ball, point: torch.Tensor, origin: torch.Tensor) -> bool:
    near = bool((distance(ball.norm, point - origin) <= ball.epsilon * (1 + SLACK) + 2**-23).all())
    return near and bool((point >= 0).all()) and bool((point <= 1).all())


@settings(deadline=None, max_examples=40)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.sampled_from([1 / 255, 0.1, 0.5, 1.0]),
    size=st.floats(1e-3, 3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
def test_starts_and_steps_stay_in_the_ball_and_in_the_range(norm, epsilon, size, scale):
    ball, origin = Ball(epsilon, norm), images().round(decimals=1)
    start = ball.start(origin, SEEDS)
    gradient = scale * torch.randn(origin.shape, generator=torch.Generator().manual_seed(1))
    assert inside(ball, start, origin)
    assert inside(ball, ball.ascend(start, origin, gradient, size), origin)
    assert inside(ball, ball.project(origin + size * gradient.clamp(-9, 9), origin), origin)


@NORM
def test_a_small_step_from_the_centre_has_its_length_and_follows_the_gradient(norm):
    ball, origin = Ball(1.0, norm), torch.full((7, 3, 5, 5), 0.5)
    gradient = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1))
    sizes = torch.linspace(0.01, 0.2, 7)
    change = ball.ascend(origin, origin, gradient, sizes) - origin
    torch.testing.assert_close(distance(norm, change).float(), sizes, rtol=1e-4, atol=1e-6)
    direction = gradient.sign() if norm == "linf" else gradient
    cosine = torch.nn.functional.cosine_similarity(change.flatten(1), direction.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(7), rtol=0, atol=1e-5)


@NORM
def test_a_gradient_of_zero_moves_nothing(norm):
    origin = images()
    ball = Ball(0.1, norm)
    start = ball.start(origin, SEEDS)
    torch.testing.assert_close(ball.ascend(start, origin, torch.zeros_like(origin), 0.05), start, rtol=0, atol=2**-23)


def test_starts_of_the_l2_ball_are_uniform():
    """In d dimensions the share of points within a distance r of the radius is r^d."""
    origin = torch.full((20000, 1, 1, 3), 0.5)
    radius = distance("l2", Ball(0.4, "l2").start(origin, torch.arange(20000)) - origin) / 0.4
    for share in (0.1, 0.5, 0.9):
        # Four standard deviations of a share of 20,000.
        assert float((radius**3 < share).double().mean()) == pytest.approx(share, abs=4 * math.sqrt(0.25 / 20000))


@NORM
def test_a_point_inside_is_not_moved(norm):
    origin = images().clamp(0.2, 0.8)
    point = origin + 0.01 * torch.rand(origin.shape)
    assert torch.equal(Ball(0.9, norm).project(point, origin), point) or norm == "linf"
    torch.testing.assert_close(Ball(0.9, norm).project(point, origin), point, rtol=0, atol=2**-23)
