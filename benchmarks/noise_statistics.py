"""Checks the distribution of the noise: `make noise-statistics`, or `python -m benchmarks.noise_statistics`.

Draws `normal_noise` for many seeds and compares it with its float64 definition element by element, and with the
standard normal distribution in moments, Kolmogorov-Smirnov distance, tails and correlations. Exits with 1 and the
names of the checks that failed, if any.

The draws are the same in every run with the same `--seed`, so a passing run stays a passing one. With other seeds a
correct generator fails one check in 1 / ALPHA by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from denim.benchmarks.exact_noise import CONTRACT, LARGEST, exact_noise
from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim.files import atomic_write

ALPHA = 1e-5
POSITIONS = 4096  # draws per seed
PAIRS = 128  # of seeds per chunk: 2^20 draws, so that memory does not grow with their number
CELLS = 1 << 20  # equally probable ones: the Kolmogorov-Smirnov distance is known to 1 / CELLS
TAILS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Check:
    """One measured number and its verdict, by a limit or by a p-value that must be at least ALPHA."""

    name: str
    value: float
    expected: str
    passed: bool
    z: float | None = None
    p: float | None = None


class Statistics:
    """Sums over chunks of draws, and the checks that follow from them."""

    def __init__(self, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.count = 0
        self.largest_error, self.error, self.largest = zeros(), zeros(), zeros()
        self.powers = zeros(4)
        self.tails = zeros(len(TAILS), dtype=torch.int64)
        self.cells = zeros(CELLS, dtype=torch.int64)
        self.products, self.square_products = zeros(4, 4), zeros(4, 4)
        self.bit_products, self.bit_counts = zeros(64), zeros(64)

    def add(self, noise: Tensor, exact: Tensor, bits: Tensor) -> None:
        """Take in noise and its definition, (pairs of seeds, 2, positions); seeds of pair i differ in bit bits[i]."""
        error = (noise.double() - exact).abs()
        self.largest_error = torch.maximum(self.largest_error, error.max())
        self.error += error.sum()
        x = noise.double().nan_to_num()  # a NaN fails the largest error; it has no place in the histogram
        self.count += x.numel()
        square = x.square()
        self.powers += torch.stack([x.sum(), square.sum(), (square * x).sum(), square.square().sum()])
        magnitude = x.abs()
        self.largest = torch.maximum(self.largest, magnitude.max())
        self.tails += torch.stack([(magnitude > tail).sum() for tail in TAILS])
        cell = (torch.special.ndtr(x) * CELLS).long().clamp(max=CELLS - 1)
        self.cells += torch.bincount(cell.flatten(), minlength=CELLS)
        groups, squares = x.reshape(-1, 4), (square.reshape(-1, 4) - 1) / math.sqrt(2)
        self.products += groups.T @ groups
        self.square_products += squares.T @ squares
        self.bit_products.index_add_(0, bits, (x[:, 0] * x[:, 1]).sum(-1))
        self.bit_counts.index_add_(0, bits, torch.full_like(bits, x.shape[-1], dtype=torch.float64))

    def checks(self) -> Iterator[Check]:
        """Every check, in the order of the table."""
        n = self.count
        worst = float(self.largest_error)
        yield Check("largest error against float64", worst, f"at most {CONTRACT:g}", worst <= CONTRACT)
        mean_error = float(self.error) / n
        yield Check("mean error against float64", mean_error, f"at most {CONTRACT / 10:g}", mean_error <= CONTRACT / 10)
        # Raw moments: the mean is so close to 0 that centring loses no digits.
        m1, m2, m3, m4 = (self.powers / n).tolist()
        variance = m2 - m1**2
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        # Sampling variances of the moments of n normals (Kendall and Stuart, volume 1, chapter 10).
        yield _by_z("mean", m1, 0, math.sqrt(1 / n))
        yield _by_z("variance", variance, 1, math.sqrt(2 / n))
        yield _by_z("skewness", third / variance**1.5, 0, math.sqrt(6 / n))
        yield _by_z("kurtosis", fourth / variance**2, 3, math.sqrt(24 / n))

        steps = torch.arange(1, CELLS + 1, dtype=torch.float64, device=self.cells.device) / CELLS
        distance = float((self.cells.cumsum(0) / n - steps).abs().max())
        p = float(stats.kstwobign.sf(distance * math.sqrt(n)))
        name = f"Kolmogorov-Smirnov distance (histogram of {CELLS} cells: +{1 / CELLS:.1e} at most)"
        yield Check(name, distance, f"about {0.83 / math.sqrt(n):.1e}", p >= ALPHA, p=p)
        for tail, found in zip(TAILS, self.tails.tolist(), strict=True):
            chance = 2 * stats.norm.sf(tail)
            p = float(stats.binomtest(found, n, chance).pvalue)
            yield Check(f"draws beyond {tail} sigma, both sides", found, f"{n * chance:.1f}", p >= ALPHA, p=p)
        largest = float(self.largest)
        yield Check(
            "largest magnitude", largest, f"at most {LARGEST:.4f} + {CONTRACT:g}", largest <= LARGEST + CONTRACT
        )

        above = torch.triu_indices(4, 4, 1)
        neighbours = [products[*above] / math.sqrt(n / 4) for products in (self.products, self.square_products)]
        yield _worst_z("correlation in a group of four: worst of 6 pairs", neighbours[0], torch.full((6,), n // 4))
        yield _worst_z("correlation of squares in a group: worst of 6 pairs", neighbours[1], torch.full((6,), n // 4))
        bits = self.bit_counts > 0
        n_bits = self.bit_counts[bits]
        z = self.bit_products[bits] / n_bits.sqrt()
        name = f"correlation of seeds that differ by one bit: worst of {len(z)} bits"
        yield _worst_z(name, z, n_bits)


def _by_z(name: str, value: float, expected: float, deviation: float) -> Check:
    z = (value - expected) / deviation
    p = float(2 * stats.norm.sf(abs(z)))
    return Check(name, value, f"{expected:g} ± {deviation:.1e}", p >= ALPHA, z, p)


def _worst_z(name: str, z: Tensor, n: Tensor) -> Check:
    """The most significant of the correlations z / sqrt(n); its p-value allows for their number (Bonferroni)."""
    index = int(z.abs().argmax())
    worst, deviation = float(z[index]), 1 / math.sqrt(float(n[index]))
    p = min(1.0, float(2 * stats.norm.sf(abs(worst))) * len(z))
    return Check(name, worst * deviation, f"0 ± {deviation:.1e}", p >= ALPHA, worst, p)


def measure(draws: int, device: torch.device, seed: int = 0) -> tuple[int, list[Check]]:
    """Check at least `draws` draws, in pairs of seeds that differ by one bit. Returns their number, and every check."""
    pairs = -(-draws // (2 * POSITIONS))
    statistics = Statistics(device)
    for first in range(0, pairs, PAIRS):
        ids = torch.arange(first, min(first + PAIRS, pairs), device=device)
        seeds, bits = derive_seeds(seed, Domain.TRAINING, ids), ids % 64
        seeds = torch.stack([seeds, seeds ^ (torch.ones_like(bits) << bits)], dim=1)
        statistics.add(normal_noise(seeds, (POSITIONS,)), exact_noise(seeds, POSITIONS), bits)
    return statistics.count, list(statistics.checks())


def _table(checks: list[Check], title: str) -> Table:
    table = Table("check", "measured", "expected", "z", "p", "", title=title, box=None)
    for check in checks:
        table.add_row(
            check.name,
            f"{check.value:.6g}",
            check.expected,
            "" if check.z is None else f"{check.z:+.2f}",
            "" if check.p is None else f"{check.p:.3g}",
            "ok" if check.passed else "[bold red]FAILED",
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_statistics", description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=float, default=1e8, help="at least this many (default 1e8)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.draws <= 1e12:
        parser.error(f"--draws must be between 1 and 1e12, got {chosen.draws:g}")
    has_gpu = torch.cuda.is_available()
    if chosen.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no GPU")
    device = torch.device("cuda" if chosen.device == "cuda" or (chosen.device == "auto" and has_gpu) else "cpu")

    start = time.perf_counter()
    count, checks = measure(int(chosen.draws), device, chosen.seed)
    seconds = time.perf_counter() - start
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(checks, f"{count} draws of normal_noise on {name}, {seconds:.0f} s"))
    if chosen.json is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__}
        facts = {"draws": count, "seed": chosen.seed, "device": name, "seconds": seconds, "versions": versions}
        with atomic_write(chosen.json) as path:
            path.write_text(json.dumps({**facts, "checks": [asdict(check) for check in checks]}, indent=1) + "\n")
    failed = [check.name for check in checks if not check.passed]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
