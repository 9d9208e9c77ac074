"""Errors and draws of sequential certificates: `python -m denim.benchmarks.certification`, a minute or two.

The chance of a false certificate is computed exactly, look by look, and simulated. Draws and lost certificates are
those of images whose probability of the top class is given: populations, or a certificates.csv of `denim certify`.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import signal, special, stats

from denim.defense.sequential import Estimation

__all__ = ["Outcome", "exact", "main", "population", "simulated"]

Floats = npt.NDArray[np.float64]

ALPHA, SELECTION = 0.001, 100
RADII = (0.25, 0.5, 1.0, 2.0)  # in units of sigma
RUNS = 100_000
# Mean and standard deviation of the normal that Phi^-1(p) has, p the probability of the top class of an image.
POPULATIONS = {"robust": (2.2, 1.6), "middling": (1.2, 1.2), "mixed": (1.5, 2.5)}


@dataclass(frozen=True)
class Outcome:
    """What an estimation makes of an image.

    Attributes:
        certified: chance of a certificate.
        draws: expected number.
    """

    certified: float
    draws: float


def exact(estimation: Estimation, chance: float, *, gives_up: bool = True) -> Outcome:
    """The outcome for one radius, by following the distribution of the successes from look to look.

    Args:
        estimation: for one radius.
        chance: that a draw is a success.
        gives_up: whether the estimation stops where the radius is out of reach. Without it the chance of a
            certificate is as large as any rule of giving up can make it.
    """
    (wanted,) = estimation.radii
    distribution, before, certified, draws = np.ones(1), 0, 0.0, 0.0
    for look, count in enumerate(estimation.looks):
        draws += (count - before) * distribution.sum()
        step = stats.binom.pmf(np.arange(count - before + 1), count - before, chance)
        distribution, before = signal.convolve(distribution, step).clip(min=0), count
        successes = np.arange(count + 1)
        bound = estimation.bound(look, successes)
        proved = estimation.radius(bound)
        wins = (proved > 0) & (proved >= wanted)
        certified += float(distribution[wins].sum())
        stops = estimation.enough(look, successes, bound) if gives_up else wins
        distribution[stops] = 0.0
    return Outcome(certified, draws)


def simulated(estimation: Estimation, chances: Floats, seed: int = 0) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Estimations of images, one for each chance: whether each is certified at the one radius, and its draws."""
    rng = np.random.default_rng(seed)
    (wanted,) = estimation.radii
    active, before = np.arange(len(chances)), 0
    successes, bounds, draws = (np.zeros(len(chances)) for _ in range(3))
    for look, count in enumerate(estimation.looks):
        successes[active] += rng.binomial(count - before, chances[active])
        before = count
        draws[active] = count
        bounds[active] = np.maximum(bounds[active], estimation.bound(look, successes[active]))
        active = active[~estimation.enough(look, successes[active], bounds[active])]
    proved = estimation.radius(bounds)
    return (proved > 0) & (proved >= wanted), draws


def population(name: str, images: int, seed: int = 0) -> Floats:
    """Chances of images whose Phi^-1 is normal, see `POPULATIONS`."""
    mean, spread = POPULATIONS[name]
    return np.asarray(special.ndtr(np.random.default_rng(seed).normal(mean, spread, images)))


def _of_file(file: Path) -> dict[str, Floats]:
    """By noise level, the shares of successes in a certificates.csv."""
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    found = {}
    for sigma in dict.fromkeys(row["sigma"] for row in rows):
        shares = [int(row["successes"]) / int(row["draws"]) for row in rows if row["sigma"] == sigma]
        found[f"sigma {float(sigma):g}"] = np.array(shares)
    return found


def main() -> None:
    """Print the chance of a false certificate, and draws and lost certificates against all N draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("certificates", nargs="?", type=Path, help="certificates.csv of a certification with all draws")
    given = parser.parse_args().certificates
    print(f"Image at the boundary: chance of a certificate, alpha = {ALPHA:g}; {RUNS:,} simulations\n")
    print("| N | radius/sigma | looks | exact, never gives up | exact | simulated |\n|---|---|---|---|---|---|")
    for most in (10_000, 100_000):
        for radius in RADII:
            estimation = Estimation(most, ALPHA, (radius,))
            chance = float(special.ndtr(radius))
            hard, soft = exact(estimation, chance, gives_up=False), exact(estimation, chance)
            share = simulated(estimation, np.full(RUNS, chance))[0].mean()
            looks = len(estimation.looks)
            print(
                f"| {most} | {radius} | {looks} | {hard.certified:.6f} | {soft.certified:.6f} | {share:.5f} |",
                flush=True,
            )
    groups = {name: population(name, 20_000) for name in POPULATIONS} if given is None else _of_file(given)
    print(f"\nDraws per image, with {SELECTION} of the selection, against N; certified in %, against all N draws\n")
    print("| N | images | radius/sigma | draws | times fewer | certified | all draws | lost |")
    print("|---|---|---|---|---|---|---|---|")
    for most in (10_000, 100_000):
        for name, chances in groups.items():
            for radius in RADII:
                certified, draws = simulated(Estimation(most, ALPHA, (radius,)), chances, seed=1)
                # The same procedure with one look is that of Cohen et al.
                whole = Estimation(most, ALPHA)
                successes = np.random.default_rng(2).binomial(most, chances)
                reference = 100 * (whole.radius(whole.bound(0, successes)) >= radius).mean()
                mean, share = draws.mean() + SELECTION, 100 * certified.mean()
                print(
                    f"| {most} | {name} | {radius} | {mean:,.0f} | {(most + SELECTION) / mean:.1f} | {share:.1f} | "
                    f"{reference:.1f} | {reference - share:+.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
