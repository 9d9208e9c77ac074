"""Scores from fresh draws, with 95 % intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

__all__ = ["Interval", "Scores", "paired_difference", "score"]

LEVEL = 0.95


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


def _wilson(successes: float, images: int) -> Interval:
    low, high = proportion_confint(successes, images, alpha=1 - LEVEL, method="wilson")
    return Interval(successes / images, float(low), float(high))


def score(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> Scores:
    """Score predictions of fresh draws.

    Intervals are Wilson's (1927). For `mean` the shares of correct draws are counted as fractions of a success. The
    variance of a share in [0, 1] is at most that of a Bernoulli variable with the same mean, so the interval is
    conservative. Unlike an interval from an estimated variance, it never has zero width.

    Args:
        predictions: int (N, R), the class that draw r gives image n.
        labels: int (N,).

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    classes, truth = np.asarray(predictions), np.asarray(labels)
    if classes.ndim != 2 or truth.shape != classes.shape[:1] or not classes.size:
        raise ValueError(f"score takes predictions (N, R) and labels (N,), got {classes.shape} and {truth.shape}")
    images, draws = classes.shape
    right = classes == truth[:, None]
    votes = right.sum(axis=1)
    counts = np.zeros((images, max(int(classes.max()), int(truth.max())) + 1), dtype=np.int64)
    np.add.at(counts, (np.arange(images)[:, None], classes), 1)
    counts[np.arange(images), truth] = -1
    return Scores(
        images,
        draws,
        mean=_wilson(float(right.mean(axis=1).sum()), images),
        vote=_wilson(int((votes > counts.max(axis=1)).sum()), images),
        worst=_wilson(int(right.all(axis=1).sum()), images),
    )


def paired_difference(first: Sequence[float] | npt.ArrayLike, second: Sequence[float] | npt.ArrayLike) -> Interval:
    """Mean of first - second over the same images, with a 95 % t interval of the paired differences.

    Args:
        first: (N,), share of correct draws by image.
        second: (N,), the same images in the same order.

    Raises:
        ValueError: fewer than two images, or sequences of different lengths.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or left.size < 2:
        raise ValueError(
            f"paired_difference takes two sequences of the same 2 or more images, got {left.shape} and {right.shape}"
        )
    difference = left - right
    mean, error = difference.mean(), stats.sem(difference)
    half = error * stats.t.ppf(0.5 + LEVEL / 2, difference.size - 1)
    return Interval(float(mean), float(mean - half), float(mean + half))
