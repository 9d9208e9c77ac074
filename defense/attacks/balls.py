"""The set of images that an attacker may choose from, in the L-infinity and in the L2 norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from denim.kernels import Stream, attack_start, attack_step, normal_noise
from denim.kernels.noise import uniform_noise

__all__ = ["NORMS", "Ball"]

NORMS = ("linf", "l2")


def _column(size: float | Tensor, pixels: Tensor) -> Tensor:
    """A number, or one per image, in a shape that broadcasts with images."""
    return torch.as_tensor(size, dtype=pixels.dtype, device=pixels.device).reshape(-1, *(1,) * (pixels.dim() - 1))


def _length(change: Tensor) -> Tensor:
    """L2 norm of each image, in a shape that broadcasts with images."""
    length: Tensor = change.flatten(1).norm(dim=1).reshape(-1, *(1,) * (change.dim() - 1))
    return length


@dataclass(frozen=True)
class Ball:
    """Images of pixels in [0, 1] whose distance from an image is at most epsilon.

    Attributes:
        epsilon: radius in [0, 1] units.
        norm: "linf" (largest change of a pixel) or "l2" (root of the sum of squared changes of all pixels).
    """

    epsilon: float
    norm: str = "linf"

    def start(self, origin: Tensor, seeds: Tensor) -> Tensor:
        """A point for each seed: uniform in the ball, then clamped to [0, 1].

        Args:
            origin: (B, C, H, W) in [0, 1].
            seeds: int64 (B,).
        """
        if self.norm == "linf":
            return attack_start(origin, seeds, epsilon=self.epsilon)
        size = origin[0].numel()
        direction = normal_noise(seeds, (size,)).view_as(origin).to(origin.dtype)
        # The radius of a uniform point of a ball is the root, of the order of its dimension, of a uniform number.
        radius = uniform_noise(seeds, (1,), Stream.START).to(origin.dtype) ** (1 / size) * self.epsilon
        return (origin + direction / _length(direction) * _column(radius.flatten(), origin)).clamp(0, 1)

    def ascend(self, iterate: Tensor, origin: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        """The point of steepest ascent at a distance from the iterates, in the ball.

        Args:
            iterate: (B, C, H, W).
            origin: of the same shape, the centres.
            gradient: of the same shape, finite.
            size: distance in the norm, in [0, 1] units; a number or (B,).
        """
        if self.norm == "linf":
            return attack_step(iterate, origin, gradient, step_size=size, epsilon=self.epsilon)
        # A gradient of zero moves nothing.
        direction = gradient / _length(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
        return self.project(iterate + _column(size, iterate) * direction, origin)

    def project(self, point: Tensor, origin: Tensor) -> Tensor:
        """Points (B, C, H, W), moved into the ball around `origin` and into [0, 1].

        In the L2 norm towards the centre and then into [0, 1], which shortens no more than it must in most pixels, but
        is not the nearest point.
        """
        if self.norm == "linf":
            return (origin + (point - origin).clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
        change = point - origin
        length = _length(change)
        inside = torch.where(length > self.epsilon, origin + change * (self.epsilon / length), point)
        return inside.clamp(0, 1)

    @staticmethod
    def check(epsilon: float, norm: str) -> None:
        """Refuse what is no ball.

        Raises:
            ValueError: an unknown norm, or a radius that is not positive or, for "linf", above 1.
        """
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; choose linf or l2")
        if norm == "linf" and not (math.isfinite(epsilon) and 0 < epsilon <= 1):
            raise ValueError(f"epsilon must be in (0, 1], such as 4/255, got {epsilon}")
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon must be positive, such as 0.5 in the L2 norm, got {epsilon}")
