"""The search for a misleading image: one rule and one loss on any number of images, a fixed number of them at a time.

Each image has a slot while it is searched for. An image that is done leaves its slot, and the next one takes it, so
that every pass is full until the last images are left. All that is random is keyed by the seed, the sample, the restart
and the step: what is found does not depend on the number of slots, nor on which images are searched together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from denim.defense.attacks.losses import loss as loss_of
from denim.defense.attacks.losses import scale_of
from denim.defense.attacks.rules import Rule, Seen, State
from denim.defense.de3 import De3
from denim.defense.targets import Target
from denim.kernels import Domain, derive_seeds

__all__ = ["Found", "Items", "Passed", "Search"]


class Items(NamedTuple):
    """Images to search for.

    Attributes:
        origin: (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        targets: int64 (N,), classes to aim at, for losses that do so.
        ids: int64 (N,), sample ids.
        sigma: float (N,), noise levels in 0-255 pixel levels in place of that of the target; None for its own.
    """

    origin: Tensor
    labels: Tensor
    targets: Tensor
    ids: Tensor
    sigma: Tensor | None = None

    def at(self, rows: Tensor) -> Items:
        """The images of these rows, int64 (M,)."""
        return Items(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]

    def logits(self, target: Target, pixels: Tensor, seeds: Tensor, *, surrogate: bool = False) -> Tensor:
        """Logits (R, N, K) of pixels in the places of these images; see `Target.draw_logits`."""
        if self.sigma is None:
            return target.draw_logits(pixels, seeds, surrogate=surrogate)
        # Of a De3 alone: other targets have no level.
        leveled: De3 = target  # type: ignore[assignment]
        return leveled.draw_logits(pixels, seeds, surrogate=surrogate, sigma=self.sigma)


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        best: (N, C, H, W), of the iterates that were passed through the target, that of the largest loss.
        last: (N, C, H, W), the last iterate.
        left: bool (N,), True for images that left before the last step; both are then the iterate that decided it.
        zero: bool (N,), True where the gradient was zero at some step.
        bad: bool (N,), True where the gradient was not finite at some step.
        passes: int64 (N,), passes of each image, with all draws.
    """

    best: Tensor
    last: Tensor
    left: Tensor
    zero: Tensor
    bad: Tensor
    passes: Tensor


Decided = Callable[[Tensor, Tensor, Items, Tensor], Tensor]
"""From iterates, their logits (R, B, K), their items and their steps, int64 (B,), to bool (B,): True for images that
need no further step."""
Passed = Callable[[int, Tensor], None]
"""Called after each pass with its number of images, B, and which of them leave the search early, bool (B,)."""


@dataclass(frozen=True)
class Search:
    """One rule and one loss.

    Attributes:
        rule: how iterates move.
        loss: a key of `losses.LOSSES`, which the search raises.
        eot: draws of each pass, over which loss and gradient are averaged (Athalye et al. 2018).
        slots: images in a pass, at most.
        towards: the aim are predictions of the items' targets, in place of any that is not the label.
    """

    rule: Rule
    loss: str
    eot: int
    slots: int
    towards: bool = False

    def run(
        self,
        target: Target,
        items: Items,
        seed: int,
        restart: int = 0,
        decided: Decided | None = None,
        passed: Passed | None = None,
    ) -> Found:
        """Search for all items.

        Args:
            target: what is attacked, in evaluation mode.
            items: any number of images.
            seed: of the evaluation.
            restart: number of the restart, below 2^31; other restarts have other starts and draws.
            decided: lets images leave early; asked after each pass.
            passed: told of each pass.

        Raises:
            ValueError: the logits do not depend on the pixels by operations of autograd.
        """
        count, device = len(items.ids), items.origin.device
        flags = torch.zeros(count, dtype=torch.bool, device=device)
        found = Found(
            items.origin.clone(),
            items.origin.clone(),
            flags,
            flags.clone(),
            flags.clone(),
            torch.zeros(count, dtype=torch.int64, device=device),
        )
        places = torch.arange(min(self.slots, count), device=device)  # of the items in the slots
        upcoming = len(places)
        state = self._open(items, places, seed, restart)
        while len(places):
            here = items.at(places)
            steps = state["step"]
            # A rule without gradients compares losses of different steps, which other draws would blur.
            drawn = steps if self.rule.needs_gradient else torch.zeros_like(steps)
            seeds = target.seeds(seed, Domain.ATTACK, here.ids, self.eot, (restart << 32) + drawn + 1)
            logits, value, gradient = self._pass(target, state, here, seeds)
            finite = None
            if gradient is not None:
                largest = gradient.flatten(1).abs().amax(dim=1)
                finite = gradient.nan_to_num()
                state["bad"] = state["bad"] | ~largest.isfinite()
                state["zero"] = state["zero"] | (largest == 0)
            improved = value > state["best_loss"]
            state["best"] = torch.where(improved.view(-1, 1, 1, 1), state["iterate"], state["best"])
            state["best_loss"] = torch.where(improved, value, state["best_loss"])
            left = torch.zeros_like(improved) if decided is None else decided(state["iterate"], logits, here, steps)
            if passed is not None:
                passed(len(places), left)
            judged = state["iterate"]
            self.rule.move(state, Seen(value, finite, improved, steps))
            state["step"] = steps + 1
            done = left | (state["step"] >= self.rule.steps)
            if not bool(done.any()):
                continue
            row, place = done.nonzero().flatten(), places[done]
            gone = left[row].view(-1, 1, 1, 1)
            found.best[place] = torch.where(gone, judged[row], state["best"][row])
            found.last[place] = torch.where(gone, judged[row], state["iterate"][row])
            found.left[place], found.zero[place], found.bad[place] = left[row], state["zero"][row], state["bad"][row]
            found.passes[place] = state["step"][row]
            fresh = torch.arange(upcoming, min(upcoming + len(row), count), device=device)
            upcoming += len(fresh)
            if len(fresh):
                taken = row[: len(fresh)]
                opened = self._open(items, fresh, seed, restart)
                state = {name: column.index_copy(0, taken, opened[name]) for name, column in state.items()}
                places = places.index_copy(0, taken, fresh)
            if len(fresh) < len(row):
                stay = torch.ones_like(done)
                stay[row[len(fresh) :]] = False
                state = {name: column[stay] for name, column in state.items()}
                places = places[stay]
        return found

    def _loss(self, logits: Tensor, state: State, items: Items) -> Tensor:
        first = scale_of(logits.detach()).to(state["scale"].dtype)
        scale = torch.where(state["step"] == 0, first, state["scale"])
        state["scale"] = scale
        if self.towards and self.loss != "dlr-targeted":
            return -loss_of(self.loss, logits, items.targets, items.targets, scale)
        return loss_of(self.loss, logits, items.labels, items.targets, scale)

    def _open(self, items: Items, places: Tensor, seed: int, restart: int) -> State:
        """The state of new images."""
        origin = items.origin[places]
        state: State = {
            "origin": origin,
            "best": origin,
            "best_loss": origin.new_full((len(origin),), -math.inf),
            "step": torch.zeros_like(places),
            "scale": origin.new_ones(len(origin)),
            "zero": torch.zeros_like(places, dtype=torch.bool),
            "bad": torch.zeros_like(places, dtype=torch.bool),
        }
        self.rule.start(state, derive_seeds(seed, Domain.ATTACK, items.ids[places], restart))
        return state

    def _pass(self, target: Target, state: State, items: Items, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (R, B, K), loss (B,) and its gradient, if the rule needs it, for the iterates."""
        iterate = state["iterate"]
        if not self.rule.needs_gradient:
            with torch.no_grad():
                logits = items.logits(target, iterate, seeds, surrogate=True)
                return logits, self._loss(logits, state, items).nan_to_num(-math.inf), None
        with torch.enable_grad():
            leaf = iterate.detach().requires_grad_()
            logits = items.logits(target, leaf, seeds, surrogate=True)
            value = self._loss(logits, state, items)
            gradient = None
            if value.requires_grad:
                with torch.autocast(leaf.device.type, enabled=False):  # backward has the dtypes of forward
                    gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        if gradient is None:
            raise ValueError(
                "the logits do not depend on the pixels by operations of autograd, so this attack would leave the "
                "images as they are, and the defense would look robust: the classifier or the denoiser detaches, "
                "rounds, leaves torch or runs under torch.no_grad. Give it a derivative, put denim.defense.Bpda around "
                "the part that has none, or use an attack without gradients such as square"
            )
        # A loss that is no number is no improvement.
        return logits.detach(), value.detach().to(iterate.dtype).nan_to_num(-math.inf), gradient
