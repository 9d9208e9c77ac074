"""Adversarial training, the baseline of every defense: PGD-AT (Madry et al. 2018) and TRADES (Zhang et al. 2019)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.kernels import attack_start, attack_step
from denim.nim.classifier import Classifier

__all__ = ["METHODS", "AdversarialTraining", "evaluating"]

METHODS = ("pgd", "trades")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode: in training, dropout hides gradients and images move statistics."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True)
class AdversarialTraining:
    """The loss of a classifier on images that are attacked while it learns.

    | method | loss of an image x with target y                                   | the attack raises       |
    |--------|--------------------------------------------------------------------|-------------------------|
    | pgd    | cross entropy(f(x'), y)                                            | cross entropy(f(x'), y) |
    | trades | cross entropy(f(x), y) + beta KL(softmax f(x), softmax f(x'))      | the divergence          |

    x' is the last iterate of projected gradient descent in the L-infinity ball around x, from a start that is drawn
    uniformly from the ball by the seed of the sample. While it is made the classifier is in evaluation mode.

    Sources: Madry et al. 2018, equation 2.1; Zhang et al. 2019, equation 5 and algorithm 1.

    Attributes:
        method: "pgd" or "trades".
        epsilon: radius in 0-255 pixel levels.
        step_size: in 0-255 pixel levels.
        steps: steps of the attack.
        beta: weight of the divergence in TRADES.
    """

    method: str
    epsilon: float = 8.0
    step_size: float = 2.0
    steps: int = 10
    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"adversarial must be {' or '.join(METHODS)}, got {self.method!r}")
        if not 0 < self.epsilon <= 255:
            raise ValueError(f"epsilon must be above 0 and at most 255 pixel levels, got {self.epsilon}")
        if not 0 < self.step_size <= 255:
            raise ValueError(f"attack_step_size must be above 0 and at most 255 pixel levels, got {self.step_size}")
        if self.steps < 1:
            raise ValueError(f"attack_steps must be at least 1, got {self.steps}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"trades_beta must not be negative, got {self.beta}")

    def loss(self, model: Classifier, pixels: Tensor, targets: Tensor, seeds: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar.

        Args:
            model: in training mode.
            pixels: float (B, C, H, W) in [0, 1].
            targets: float (B, K), rows that add up to 1.
            seeds: int64 (B,), of the start of the attack and of drop path.
        """
        if self.method == "pgd":

            def raised(logits: Tensor) -> Tensor:
                return F.cross_entropy(logits, targets, reduction="sum")

            return F.cross_entropy(model(self.attacked(model, pixels, seeds, raised), seeds), targets)
        with torch.no_grad(), evaluating(model):
            clean = model(pixels).log_softmax(dim=-1)
        attacked = self.attacked(model, pixels, seeds, lambda logits: _divergence(clean, logits))
        logits = model(pixels, seeds)
        divergence = _divergence(logits.log_softmax(dim=-1), model(attacked, seeds)) / len(pixels)
        return F.cross_entropy(logits, targets) + self.beta * divergence

    def attacked(
        self, model: Classifier, pixels: Tensor, seeds: Tensor, objective: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The attacked images.

        Args:
            model: a classifier.
            pixels: float (B, C, H, W) in [0, 1].
            seeds: int64 (B,), of the start.
            objective: what the attack raises, a sum over images, from logits (B, K).

        Returns:
            (B, C, H, W) in [0, 1], at most `epsilon` from the pixels.
        """
        epsilon, step_size = self.epsilon / 255, self.step_size / 255
        iterate = attack_start(pixels, seeds, epsilon=epsilon)
        with evaluating(model):
            for _ in range(self.steps):
                with torch.enable_grad():
                    leaf = iterate.detach().requires_grad_()
                    value = objective(model(leaf))
                    with torch.autocast(pixels.device.type, enabled=False):  # backward has the dtypes of forward
                        (gradient,) = torch.autograd.grad(value, leaf)
                iterate = attack_step(iterate, pixels, gradient, step_size=step_size, epsilon=epsilon)
        return iterate


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Sum over images of KL(reference, softmax of the logits), from log probabilities (B, K) and logits (B, K)."""
    return F.kl_div(logits.log_softmax(dim=-1), reference, reduction="sum", log_target=True)
