"""Sequential estimation for certificates: when the draws of an image are looked at, and what the counts then prove."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special

__all__ = ["Estimation", "lower_bound"]

Floats = npt.NDArray[np.float64]

FIRST, RATIO = 50, 1.3  # draws at the first look, and from each look to the next
LAST = 0.5  # share of alpha that the last look has; the others have equal parts of the rest
OPTIMISM = 2.0  # standard errors by which the rate of successes may still rise; it decides draws, never an error


def lower_bound(successes: npt.ArrayLike, draws: int, alpha: float) -> Floats:
    """One-sided lower bound of Clopper and Pearson (1934) for the probability of a success.

    The bound exceeds the probability with a chance of at most alpha.

    Args:
        successes: of the draws, any shape.
        draws: n.
        alpha: chance of an error.

    Returns:
        float64 of the same shape; 0 without a success.
    """
    counts = np.asarray(successes, dtype=np.float64)
    # The quantile alpha of Beta(s, n - s + 1); without a success there is no such distribution.
    return np.where(counts > 0, special.betaincinv(np.maximum(counts, 1), draws - np.maximum(counts, 1) + 1, alpha), 0)


@dataclass(frozen=True)
class Estimation:
    """Estimates the probability of the top class from up to N draws, and says when enough is known.

    Without radii and a tolerance there is one look, after all N draws: the procedure of Cohen et al. (2019). With
    either there are K looks, after 50, 65, 85, ... and N draws. At look k the bound of Clopper and Pearson is taken at
    alpha_k; the alpha_k sum to alpha. So the chance that any of the K bounds is false is at most alpha, whatever stops
    the estimation (Bonferroni over the looks; group sequential tests, Jennison and Turnbull 1999, chapter 7). The
    largest bound until now is the one that counts.

    Radii are in units of the noise's standard deviation: Phi^-1(bound), 0 (abstention) below a bound of 1/2.

    Args:
        draws: N, at most.
        alpha: chance of a false certificate.
        radii: stop when each of them is certified, or within reach no more.
        tolerance: stop when the radius that is within reach is larger by at most this.
    """

    draws: int
    alpha: float
    radii: tuple[float, ...] = ()
    tolerance: float | None = None
    looks: tuple[int, ...] = field(init=False)
    errors: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        looks, errors = [self.draws], [self.alpha]
        if self.radii or self.tolerance is not None:
            early = [round(FIRST * RATIO**k) for k in range(math.ceil(math.log(max(self.draws / FIRST, 1), RATIO)))]
            early = [count for count in early if count < self.draws / math.sqrt(RATIO)]
            if early:
                looks = [*early, self.draws]
                errors = [self.alpha * (1 - LAST) / len(early)] * len(early) + [self.alpha * LAST]
        object.__setattr__(self, "looks", tuple(looks))
        object.__setattr__(self, "errors", tuple(errors))

    @property
    def largest_radius(self) -> float:
        """The radius of an image all of whose N draws give one class: no radius is larger."""
        return float(self.radius(lower_bound(self.draws, self.draws, self.errors[-1])))

    def radius(self, bound: npt.ArrayLike) -> Floats:
        """Radius that a lower bound of the probability proves, in units of the noise's standard deviation.

        Args:
            bound: in [0, 1], any shape.

        Source: Cohen et al. (2019), theorem 1 with p_B = 1 - p_A.
        """
        radius: Floats = np.maximum(special.ndtri(np.asarray(bound, dtype=np.float64)), 0)
        return radius

    def bound(self, look: int, successes: npt.ArrayLike) -> Floats:
        """Lower bound at a look, from the successes of all draws until then."""
        return lower_bound(successes, self.looks[look], self.errors[look])

    def within_reach(self, look: int, successes: npt.ArrayLike) -> Floats:
        """The bound of the last look, if the share of successes rises by two standard errors until then.

        What is out of reach is given up. This makes no certificate false: it forgoes some.

        Args:
            look: now.
            successes: of all draws until now, any shape.
        """
        counts, now = np.asarray(successes, dtype=np.float64), self.looks[look]
        # The share with two successes and two failures more (Agresti and Coull 1998): its variance is never zero.
        share = (counts + OPTIMISM**2 / 2) / (now + OPTIMISM**2)
        error = np.sqrt(share * (1 - share) * (1 / now - 1 / self.draws))
        final = np.minimum(counts / now + OPTIMISM * error, 1) * self.draws
        # A product such as 0.1 * 50 may lie below the whole number that it is.
        return lower_bound(np.floor(final + 1e-6), self.draws, self.errors[-1])

    def enough(self, look: int, successes: npt.ArrayLike, bound: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether an estimation stops.

        Args:
            look: now.
            successes: of all draws until now, any shape.
            bound: the largest until now, of the same shape.
        """
        counts = np.asarray(successes)
        if look == len(self.looks) - 1:
            return np.ones(counts.shape, dtype=bool)
        radius, reach = self.radius(bound), self.radius(self.within_reach(look, counts))
        stops = np.ones(counts.shape, dtype=bool)
        for wanted in self.radii:
            stops &= (radius > 0) & (radius >= wanted) | (reach < wanted) | (reach <= 0)
        if self.tolerance is not None:
            stops &= reach - radius <= self.tolerance
        return stops
