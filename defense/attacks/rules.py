"""Rules by which an attack moves: FGSM, PGD, PGD with momentum, and AutoPGD.

A rule knows nothing of models and draws: `denim.defense.attacks.search` gives it losses and gradients of a batch of
images, each of which may be at a step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from denim.defense.attacks.balls import Ball

__all__ = ["Apgd", "Fgsm", "Momentum", "Pgd", "Rule", "Seen", "State"]

State = dict[str, Tensor]
"""What is known of each image, by name; images are the first dimension of every tensor.

`search` keeps `origin`, `iterate`, `best` (of the iterates so far, that of the largest loss) and `best_loss`. A rule
moves `iterate`, and adds what it remembers.
"""


class Seen(NamedTuple):
    """What one pass has shown of the iterates.

    Attributes:
        loss: (B,), of the iterates, averaged over draws.
        gradient: (B, C, H, W), of the loss, finite; None for rules that use none.
        improved: bool (B,), True where the loss is the largest so far.
        step: int64 (B,), passes of each image before this one.
    """

    loss: Tensor
    gradient: Tensor | None
    improved: Tensor
    step: Tensor


class Rule(Protocol):
    """How an attack moves."""

    @property
    def steps(self) -> int:
        """Passes for each image."""
        ...

    @property
    def needs_gradient(self) -> bool:
        """Whether a pass computes gradients."""
        ...

    def start(self, state: State, seeds: Tensor) -> None:
        """Add the first iterate, and what the rule remembers, to the state of new images.

        Args:
            state: has `origin`.
            seeds: int64 (B,), of the image and the restart.
        """
        ...

    def move(self, state: State, seen: Seen) -> None:
        """Move the iterates by what a pass has shown of them."""
        ...


def _where(condition: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *(1,) * (images.dim() - 1)), images, others)


@dataclass(frozen=True)
class Fgsm:
    """One step of the length of the radius, from the image itself (Goodfellow et al. 2015)."""

    ball: Ball
    steps: int = 1
    needs_gradient: bool = True

    def start(self, state: State, seeds: Tensor) -> None:
        """See `Rule`."""
        state["iterate"] = state["origin"]

    def move(self, state: State, seen: Seen) -> None:
        """See `Rule`."""
        assert seen.gradient is not None
        state["iterate"] = self.ball.ascend(state["iterate"], state["origin"], seen.gradient, self.ball.epsilon)


@dataclass(frozen=True)
class Pgd:
    """Projected gradient descent (Madry et al. 2018) from a random point of the ball.

    The step size is epsilon / 4, halved after half and again after three quarters of the steps.
    """

    ball: Ball
    steps: int
    needs_gradient: bool = True

    def start(self, state: State, seeds: Tensor) -> None:
        """See `Rule`."""
        state["iterate"] = self.ball.start(state["origin"], seeds)

    def move(self, state: State, seen: Seen) -> None:
        """See `Rule`."""
        assert seen.gradient is not None
        size = self._sizes(seen.step, state["origin"].dtype)
        state["iterate"] = self.ball.ascend(state["iterate"], state["origin"], seen.gradient, size)

    def _sizes(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        halvings = (2 * step >= self.steps).to(dtype) + (4 * step >= 3 * self.steps).to(dtype)
        return self.ball.epsilon / 4 * 0.5**halvings


@dataclass(frozen=True)
class Momentum(Pgd):
    """PGD along the sum of the gradients so far, each of mean absolute value 1 (Dong et al. 2018, with mu = 1)."""

    def start(self, state: State, seeds: Tensor) -> None:
        """See `Rule`."""
        super().start(state, seeds)
        state["velocity"] = torch.zeros_like(state["origin"])

    def move(self, state: State, seen: Seen) -> None:
        """See `Rule`."""
        assert seen.gradient is not None
        scale = seen.gradient.abs().flatten(1).mean(dim=1).clamp(min=torch.finfo(seen.gradient.dtype).tiny)
        state["velocity"] = state["velocity"] + seen.gradient / scale.view(-1, *(1,) * (seen.gradient.dim() - 1))
        super().move(state, seen._replace(gradient=state["velocity"]))


@dataclass(frozen=True)
class Apgd:
    """AutoPGD: steps with momentum, whose size halves by itself (Croce and Hein 2020, algorithm 1 and section 3).

    The size begins at twice the radius. At checkpoints, whose distance falls from 22 % to 6 % of the steps, it is
    halved where the loss rose in at most 75 % of the steps since the last one, or where neither size nor best loss have
    changed since then; the search then goes on from the best iterate.
    """

    ball: Ball
    steps: int
    needs_gradient: bool = True

    def start(self, state: State, seeds: Tensor) -> None:
        """See `Rule`."""
        origin = state["origin"]
        start = self.ball.start(origin, seeds)
        per_image = origin.new_zeros(len(origin))
        state |= {
            "iterate": start,
            "before": start,
            "best_gradient": torch.zeros_like(origin),
            "size": per_image + 2 * self.ball.epsilon,
            "last_loss": per_image,
            "rises": per_image,
            "best_at_check": per_image,
            # As if halved before: the first checkpoint asks for rises alone.
            "halved_at_check": torch.ones_like(per_image, dtype=torch.bool),
        }

    def _checks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per pass: whether it is a checkpoint, and the passes since the one before."""
        distance = max(int(0.22 * self.steps), 1)
        least, less = max(int(0.06 * self.steps), 1), max(int(0.03 * self.steps), 1)
        spans, place = [0] * (self.steps + 1), distance
        while place <= self.steps:
            spans[place] = distance
            distance = max(distance - less, least)
            place += distance
        span = torch.tensor(spans, device=device)
        return span > 0, span

    def move(self, state: State, seen: Seen) -> None:
        """See `Rule`."""
        assert seen.gradient is not None
        step, first = seen.step, seen.step == 0
        state["best_gradient"] = _where(seen.improved, seen.gradient, state["best_gradient"])
        rises = torch.where(first, 0.0, state["rises"] + (seen.loss > state["last_loss"]).to(state["rises"].dtype))
        at, spans = self._checks(step.device)
        check, span = at[step], spans[step]
        stuck = ~state["halved_at_check"] & (state["best_at_check"] >= state["best_loss"])
        halve = check & ((rises <= 0.75 * span) | stuck)
        state["size"] = torch.where(halve, state["size"] / 2, state["size"])
        state["halved_at_check"] = torch.where(check, halve, state["halved_at_check"])
        state["best_at_check"] = torch.where(check | first, state["best_loss"], state["best_at_check"])
        state["rises"] = torch.where(check, 0.0, rises)
        state["last_loss"] = seen.loss

        iterate = _where(halve, state["best"], state["iterate"])
        gradient = _where(halve, state["best_gradient"], seen.gradient)
        origin = state["origin"]
        ahead = self.ball.ascend(iterate, origin, gradient, state["size"])
        # The first step has no momentum.
        share = torch.where(first, 1.0, 0.75).to(origin.dtype).view(-1, *(1,) * (origin.dim() - 1))
        moved = iterate + share * (ahead - iterate) + (1 - share) * (iterate - state["before"])
        state["before"] = iterate
        state["iterate"] = self.ball.project(moved, origin)
