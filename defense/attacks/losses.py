"""Losses that attacks raise, as functions of the logits of several draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LOSSES", "loss", "scale_of"]

# Of the largest and the smallest logit of an image where its search starts, when the loss is computed. Cross entropy at
# this scale is about as strong as at that of a trained model, and is the same whatever logits are multiplied with.
GAP = 15.0


def _true(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.expand(logits.shape[:-1])[..., None]).squeeze(-1)


def _best_other(logits: Tensor, labels: Tensor) -> Tensor:
    index = labels.expand(logits.shape[:-1])[..., None]
    return logits.scatter(-1, index, -math.inf).amax(dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the label, its mean over the draws."""
    return -_true(logits.log_softmax(dim=-1), labels).mean(dim=0)


def mean_probability(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the mean probability of the draws: what a majority vote is attacked through."""
    return math.log(len(logits)) - _true(logits.log_softmax(dim=-1), labels).logsumexp(dim=0)


def margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The largest logit of another class less that of the label, its mean over the draws (Carlini and Wagner 2017)."""
    return (_best_other(logits, labels) - _true(logits, labels)).mean(dim=0)


def _spread(logits: Tensor, last: int) -> Tensor:
    """What makes a difference of logits the same for any scale of the logits: the first less the `last` largest."""
    ordered = logits.topk(min(last, logits.shape[-1]), dim=-1).values
    if logits.shape[-1] < 3:
        # Of two classes the difference divided by itself has no gradient.
        return logits.abs().sum(dim=-1).detach() + 1e-12
    behind = ordered[..., 2] if last < 4 or logits.shape[-1] < 4 else (ordered[..., 2] + ordered[..., 3]) / 2
    return ordered[..., 0] - behind + 1e-12


def dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The difference of logits ratio, its mean over the draws (Croce and Hein 2020, equation 6).

    With two classes, where it has no gradient, the margin over the sum of the absolute logits.
    """
    return ((_best_other(logits, labels) - _true(logits, labels)) / _spread(logits, 3)).mean(dim=0)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The ratio for one other class, its mean over the draws (Croce and Hein 2020, equation 7)."""
    return ((_true(logits, targets) - _true(logits, labels)) / _spread(logits, 4)).mean(dim=0)


LOSSES = {
    "ce": cross_entropy,
    "mean-probability": mean_probability,
    "margin": margin,
    "dlr": dlr,
    "dlr-targeted": targeted_dlr,
}
"""Losses by name, each from logits (R, B, K), labels (B,) and target classes (B,) to (B,); larger misleads more."""


def scale_of(logits: Tensor) -> Tensor:
    """What makes the largest and the smallest logit of each image differ by `GAP`, the mean of its draws.

    Of several draws, by `GAP` at most: where they differ by less, larger logits would leave the mean to a few draws,
    and the attack would be weaker.

    Args:
        logits: (R, B, K), where searches start.

    Returns:
        (B,), finite and positive.
    """
    gap = (logits.amax(dim=-1) - logits.amin(dim=-1)).mean(dim=0)
    scale = torch.where((gap > 0) & gap.isfinite(), GAP / gap, 1.0)
    return scale if len(logits) == 1 else scale.clamp(max=1.0)


def loss(name: str, logits: Tensor, labels: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """A loss by its name.

    The logits are scaled first, by a number for each image. Otherwise cross entropy would vanish in float32 where
    logits differ by more than about 100, and a model would look robust because its logits are large.

    Args:
        name: a key of `LOSSES`.
        logits: (R, B, K) of R draws; half precision is computed in float32.
        labels: int64 (B,), the true classes.
        targets: int64 (B,), classes to aim at; without effect for losses that aim at none.
        scale: (B,), see `scale_of`.

    Returns:
        (B,).

    Raises:
        KeyError: unknown name.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return LOSSES[name](exact * scale[:, None].to(exact.dtype), labels, targets)
