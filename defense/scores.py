"""Scores from fresh draws, with 95 % intervals over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Interval", "Scores", "draws_needed", "paired_difference", "resubmission_curve", "score"]

LEVEL = 0.95
# How much wider than with any number of draws the interval of a mean may be, where the number is chosen.
SHARE = 0.05
FEWEST_DRAWS, MOST_DRAWS = 4, 100
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with a 95 % interval over images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Scores:
    """Accuracy of a randomized classifier on one set of images.

    Attributes:
        num_images: number N of images.
        score_draws: number R of fresh draws.
        mean: expected accuracy of one draw.
        vote: accuracy of the majority vote of R draws, a tie counting as lost.
        worst: share of images that all R draws get right.
    """

    num_images: int
    score_draws: int
    mean: Interval
    vote: Interval
    worst: Interval


def interval_bounds(
    totals: npt.ArrayLike, squares: npt.ArrayLike, images: int, lowest: float, highest: float
) -> tuple[Floats, Floats]:
    """Bounds of the mean of a number that every image has, from the variance over the images.

    With d the distance of the mean from the farther end of its range, and z = 1.96:

        mean +- z sqrt(sum of (x - mean)^2 + z^2 d^2) / N        cut to the range

    The second term stands for what no image has shown yet, as the z^2 observations do that Agresti and Coull (1998) add
    to N coins. Where all images are equal the interval reaches z^2 / N = 3.84 / N, of which "the rule of three" (Hanley
    and Lippman-Hand 1983) is the one-sided form. docs/method.md has its coverage.

    Args:
        totals: sums over the images, any shape.
        squares: sums of squares over the images, of the same shape.
        images: number N of images.
        lowest, highest: range of the number.

    Returns:
        Lower and upper bounds, of the shape of the totals.
    """
    sums = np.asarray(totals, dtype=np.float64)
    means = sums / images
    scatter = np.maximum(np.asarray(squares, dtype=np.float64) - means * sums, 0)
    farther = np.maximum(means - lowest, highest - means)
    half = Z * np.sqrt(scatter + (Z * farther) ** 2) / images
    return np.maximum(means - half, lowest), np.minimum(means + half, highest)


def _interval(values: npt.NDArray[Any], lowest: float, highest: float) -> Interval:
    numbers = values.astype(np.float64)
    low, high = interval_bounds(numbers.sum(), np.square(numbers).sum(), len(numbers), lowest, highest)
    return Interval(float(numbers.mean()), float(low), float(high))


def _classes(values: npt.ArrayLike, name: str, num_classes: int | None) -> npt.NDArray[np.int64]:
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers of classes, got {given.dtype}; logits are no {name}")
    above = given < 0
    if num_classes is not None:
        above |= given >= num_classes
    if above.any():
        number = f"{num_classes} classes" if num_classes is not None else "classes"
        wrong = ", ".join(map(str, np.unique(given[above])[:5]))
        raise ValueError(f"{name} of {number} count from 0, got {wrong} in {int(above.sum())} of {given.size} places")
    return given.astype(np.int64)


def _checked(
    predictions: npt.ArrayLike, labels: npt.ArrayLike, num_classes: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    classes, truth = np.asarray(predictions), np.asarray(labels)
    if classes.ndim != 2 or truth.shape != classes.shape[:1] or not classes.size:
        raise ValueError(f"score takes predictions (N, R) and labels (N,), got {classes.shape} and {truth.shape}")
    return _classes(classes, "predictions", num_classes), _classes(truth, "labels", num_classes)


def score(predictions: npt.ArrayLike, labels: npt.ArrayLike, num_classes: int | None = None) -> Scores:
    """Score predictions of fresh draws.

    Every image has a number from 0 to 1: its share of correct draws, or whether its vote or all its draws are correct.
    The intervals of their means are those of `interval_bounds`; they never have zero width.

    Args:
        predictions: int (N, R), the class that draw r gives image n.
        labels: int (N,).
        num_classes: number of classes, to check predictions and labels; None checks that they are not negative.

    Raises:
        ValueError: no images, shapes that do not fit, classes that are no whole numbers or out of range.
    """
    classes, truth = _checked(predictions, labels, num_classes)
    images, draws = classes.shape
    right = classes == truth[:, None]
    votes = right.sum(axis=1)
    counts = np.zeros((images, max(int(classes.max()), int(truth.max())) + 1), dtype=np.int64)
    np.add.at(counts, (np.arange(images)[:, None], classes), 1)
    counts[np.arange(images), truth] = -1
    return Scores(
        images,
        draws,
        mean=_interval(right.mean(axis=1), 0, 1),
        vote=_interval(votes > counts.max(axis=1), 0, 1),
        worst=_interval(right.all(axis=1), 0, 1),
    )


def draws_needed(right: npt.ArrayLike, images: int) -> int:
    """Fewest draws R with which the interval of the mean is at most 5 % wider than with any number of draws.

    From V, the variance between the images' chances p to be right, and W, the mean of p (1 - p), the interval of
    `interval_bounds` of N images has a half-width of about

        z sqrt(V + W / R + z^2 d^2 / N) / sqrt(N)

    which is the variance of a mean in two stages, here of images and of draws for each (Cochran 1977, Sampling
    Techniques, section 10.3). V and W are estimated without bias from a pilot (ibid., section 10.5).

    Args:
        right: bool (M, R0), which of R0 draws of the images of a pilot are right; at least 2 of each.
        images: number N of images of the evaluation.

    Returns:
        From 4 to 100.

    Raises:
        ValueError: fewer than two images or two draws.
    """
    hits: Floats = np.asarray(right, dtype=np.float64)
    if hits.ndim != 2 or min(hits.shape) < 2:
        raise ValueError(f"draws_needed takes 2 or more images and draws (M, R0), got {hits.shape}")
    shares = hits.mean(axis=1)
    within = float((shares * (1 - shares)).mean()) * hits.shape[1] / (hits.shape[1] - 1)
    between = max(0.0, float(shares.var(ddof=1)) - within / hits.shape[1])
    mean = float(shares.mean())
    unseen = (Z * max(mean, 1 - mean)) ** 2 / images
    needed: float = within / ((between + unseen) * (1 / (1 - SHARE) ** 2 - 1))
    return min(max(math.ceil(needed), FEWEST_DRAWS), MOST_DRAWS)


def resubmission_curve(
    predictions: npt.ArrayLike, labels: npt.ArrayLike, num_classes: int | None = None
) -> tuple[Interval, ...]:
    """Accuracy against an attacker who may submit an image n times and needs one wrong answer, for n = 1 .. R.

    An image of whose R draws m are correct withstands n of them, drawn without replacement, with probability
    C(m, n) / C(R, n) (hypergeometric). This is an unbiased estimate of the probability that n fresh draws are all
    correct. The first entry is the mean of `score`, and the last its worst.

    Args:
        predictions: int (N, R), the class that draw r gives image n.
        labels: int (N,).
        num_classes: as for `score`.

    Returns:
        R intervals, over the images.

    Raises:
        ValueError: as `score`.
    """
    classes, truth = _checked(predictions, labels, num_classes)
    draws = classes.shape[1]
    right = (classes == truth[:, None]).sum(axis=1).astype(np.float64)
    withstood, curve = np.ones(len(right)), []
    for tried in range(draws):
        withstood = withstood * np.maximum(right - tried, 0) / (draws - tried)
        curve.append(_interval(withstood, 0, 1))
    return tuple(curve)


def paired_difference(first: Sequence[float] | npt.ArrayLike, second: Sequence[float] | npt.ArrayLike) -> Interval:
    """Mean of first - second over the same images, with the 95 % interval of `interval_bounds` in [-1, 1].

    Args:
        first: (N,), a number in [0, 1] for every image, such as its share of correct draws.
        second: (N,), the same images in the same order.

    Raises:
        ValueError: fewer than two images, sequences of different lengths, or numbers outside of [0, 1].
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or left.size < 2:
        raise ValueError(
            f"paired_difference takes two sequences of the same 2 or more images, got {left.shape} and {right.shape}"
        )
    for name, values in (("first", left), ("second", right)):
        if not ((values >= 0) & (values <= 1)).all():  # written so that NaN fails
            raise ValueError(f"{name} must have shares in [0, 1], got from {values.min():g} to {values.max():g}")
    return _interval(left - right, -1, 1)
