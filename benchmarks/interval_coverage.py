"""How often the intervals of scores hold the truth: `python -m denim.benchmarks.interval_coverage`, a minute or two.

An image of a simulated evaluation has one of finitely many numbers (its share of R correct draws, or a difference of
two shares), so an evaluation of N images is one draw of a multinomial distribution.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import stats

from denim.defense.scores import interval_bounds

__all__ = ["coverage_of_differences", "coverage_of_shares", "main"]

IMAGES = (50, 100, 200, 500, 1000)
DRAWS = (1, 2, 5, 20)
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999)
SPREADS = (0.02, 0.5, 2.0, 10.0, np.inf)
DIFFERING = (0.2, 0.5, 1, 2, 3, 4, 5, 8)
RUNS = 20_000


def _coverage(
    chances: npt.NDArray[np.float64], values: npt.NDArray[np.float64], images: int, lowest: float, runs: int
) -> tuple[float, float]:
    """Share of simulated evaluations whose interval holds the mean, and the mean width."""
    counts = np.random.default_rng(0).multinomial(images, chances / chances.sum(), runs)
    low, high = interval_bounds(counts @ values, counts @ values**2, images, lowest, 1.0)
    truth = chances @ values / chances.sum()
    inside = (low <= truth + 1e-12) & (truth <= high + 1e-12)
    return float(inside.mean()), float((high - low).mean())


def coverage_of_shares(images: int, share: float, spread: float, draws: int, runs: int = RUNS) -> tuple[float, float]:
    """Coverage and mean width of the interval of the mean accuracy.

    Args:
        images: number of images.
        share: true accuracy.
        spread: an image's chance to be correct is drawn from Beta(share * spread, (1 - share) * spread): near 0 images
            are always right or always wrong, infinity gives all the same chance.
        draws: of each image.
        runs: simulated evaluations.
    """
    numbers = np.arange(draws + 1)
    if np.isinf(spread):
        chances = stats.binom.pmf(numbers, draws, share)
    else:
        chances = stats.betabinom.pmf(numbers, draws, share * spread, (1 - share) * spread)
    return _coverage(chances, numbers / draws, images, 0.0, runs)


def coverage_of_differences(
    images: int, rate: float, side: float, draws: int, size: float, runs: int = RUNS
) -> tuple[float, float]:
    """Coverage and mean width of the interval of a paired difference.

    Args:
        images: number of images.
        rate: share of images that differ at all.
        side: share of these on which the first is better.
        draws: of each image.
        size: chance that a draw of such an image differs.
        runs: simulated evaluations.
    """
    one_sided = stats.binom.pmf(np.arange(draws + 1), draws, size)
    chances = np.zeros(2 * draws + 1)
    chances[draws:] += rate * side * one_sided
    chances[: draws + 1] += rate * (1 - side) * one_sided[::-1]
    chances[draws] += 1 - rate
    return _coverage(chances, np.arange(-draws, draws + 1) / draws, images, -1.0, runs)


def main() -> None:
    """Print the lowest coverage for every number of images and draws."""
    print("lowest coverage in % over the grid\n")
    print("| images | draws | mean accuracy | paired difference |\n|---|---|---|---|")
    for images, draws in product(IMAGES, DRAWS):
        shares = [coverage_of_shares(images, *case, draws)[0] for case in product(SHARES, SPREADS)]
        rates = [*(number / images for number in DIFFERING), 0.05, 0.2]
        cases = product(rates, (1.0, 0.75, 0.5), (1.0, 0.3, 0.05))
        pairs = [coverage_of_differences(images, rate, side, draws, size)[0] for rate, side, size in cases]
        print(f"| {images} | {draws} | {100 * min(shares):.1f} | {100 * min(pairs):.1f} |", flush=True)


if __name__ == "__main__":
    main()
