"""Square attack: random squares, kept where they raise the loss; it needs no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from denim.defense.attacks.balls import Ball
from denim.defense.attacks.rules import Seen, State
from denim.kernels import Domain, Stream, derive_seeds
from denim.kernels.noise import uniform_noise

__all__ = ["Square"]


@dataclass(frozen=True)
class Square:
    """Random search in the L-infinity ball (Andriushchenko et al. 2020, algorithms 1 and 2).

    The search begins with vertical stripes of a random sign per channel. Each step sets one square to plus or minus
    epsilon, with a random sign per channel, and keeps it if the loss rises. The share of pixels of a square begins at
    0.8 and is halved at fixed steps.
    """

    ball: Ball
    steps: int
    needs_gradient: bool = False

    def start(self, state: State, seeds: Tensor) -> None:
        """See `Rule`."""
        origin = state["origin"]
        _, channels, _, width = origin.shape
        stripes = uniform_noise(seeds, (channels, 1, width), Stream.START).to(origin.dtype)
        state["iterate"] = self.ball.project(origin + self.ball.epsilon * (2 * (stripes > 0.5) - 1), origin)
        state["seeds"] = seeds

    def move(self, state: State, seen: Seen) -> None:
        """See `Rule`. The next iterate is the best one with a square."""
        origin, best = state["origin"], state["best"]
        _, channels, height, width = origin.shape
        seeds = derive_seeds(0, Domain.ATTACK, state["seeds"], seen.step)
        uniform = uniform_noise(seeds, (2 + channels,), Stream.START)
        side = self._sides(seen.step, height, width)
        top = (uniform[:, 0] * (height - side + 1)).floor()[:, None, None]
        left = (uniform[:, 1] * (width - side + 1)).floor()[:, None, None]
        rows = torch.arange(height, device=origin.device)[None, :, None]
        columns = torch.arange(width, device=origin.device)[None, None, :]
        end = side[:, None, None]
        inside = (rows >= top) & (rows < top + end) & (columns >= left) & (columns < left + end)
        signs = (2 * (uniform[:, 2:] > 0.5) - 1).to(origin.dtype)[..., None, None]
        square = (origin + self.ball.epsilon * signs).clamp(0, 1)
        state["iterate"] = torch.where(inside[:, None], square, best)

    def _sides(self, step: Tensor, height: int, width: int) -> Tensor:
        """float (B,): the side of the next square, for the number of queries so far as a share of 10,000."""
        done = step * 10_000 // self.steps
        halvings = torch.stack([(done > bound) for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)]).sum(
            dim=0
        )
        area = 0.8 * 0.5 ** halvings.double() * height * width
        return area.sqrt().round().clamp(1, max(1, min(height, width) - 1) if min(height, width) > 1 else 1)
