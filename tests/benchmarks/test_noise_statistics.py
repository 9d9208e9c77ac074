"""`make noise-statistics`: a generator that is right passes, and every way to be wrong fails the check meant for it."""

import json
import math

import pytest
import torch

from denim.benchmarks import noise_statistics
from denim.benchmarks.exact_noise import LARGEST, exact_normals

DRAWS = 100_000
RIGHT = noise_statistics.normal_noise


def test_the_generator_passes(tmp_path, capsys, global_rng_untouched):
    out = tmp_path / "deep" / "numbers.json"
    assert noise_statistics.main(["--draws", "1e5", "--device", "cpu", "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert numbers["draws"] >= DRAWS
    assert [check["passed"] for check in numbers["checks"]] == [True] * 15
    printed = capsys.readouterr().out
    assert all(check["name"][:30] in printed for check in numbers["checks"])


def test_chunks_change_nothing(monkeypatch):
    _, whole = noise_statistics.measure(DRAWS, torch.device("cpu"))
    monkeypatch.setattr(noise_statistics, "PAIRS", 5)
    _, parts = noise_statistics.measure(DRAWS, torch.device("cpu"))
    # Sums of 10^5 float64 numbers in another order.
    assert [check.value for check in parts] == pytest.approx([check.value for check in whole], rel=1e-9, abs=1e-12)


def test_definition_at_known_words():
    """u = 2^-33 is the largest radius; u = 1/2 - 2^-33 and its neighbour by hand; angles of whole quarters."""
    first = torch.tensor([0, (1 << 31) - 1, (1 << 32) - 1])
    cosine, sine = exact_normals(first, torch.tensor([0, 1 << 30, 1 << 31]))
    assert cosine[0] == pytest.approx(LARGEST, rel=1e-15)
    assert sine[1] == pytest.approx(math.sqrt(-2 * math.log(0.5 - 2**-33)), rel=1e-15)
    # -2 ln(1 - 2^-33) = 2^-32 (1 + 2^-34 + ...): next to u = 1 float64 keeps all its digits.
    assert cosine[2] == pytest.approx(-(2**-16) * (1 + 2**-35), rel=1e-15)


def scaled(seeds, shape):
    return RIGHT(seeds, shape) * 1.03


def shifted(seeds, shape):
    return RIGHT(seeds, shape) + 0.02


def skewed(seeds, shape):
    x = RIGHT(seeds, shape)
    return x + 0.02 * (x.square() - 1)


def tails_cut(seeds, shape):
    """A bfloat16 generator never passes 3.5 sigma; this one stops at 3."""
    return RIGHT(seeds, shape).clamp(-3, 3)


def tails_shifted(seeds, shape):
    x = RIGHT(seeds, shape)
    return torch.where(x.abs() > 2.9, x * 1.1, x)


def beyond_the_largest(seeds, shape):
    noise = RIGHT(seeds, shape)
    noise[0, 0, 0] = 7
    return noise


def words_used_twice(seeds, shape):
    noise = RIGHT(seeds, shape).unflatten(-1, (-1, 4)).clone()
    noise[..., 3] = noise[..., 0]
    return noise.flatten(-2)


def radius_shared(seeds, shape):
    """Uncorrelated normals whose squares are not: magnitudes of a group repeat with random signs."""
    noise = RIGHT(seeds, shape).unflatten(-1, (-1, 4)).clone()
    noise[..., 2] = noise[..., 0].abs() * noise[..., 2].sign()
    return noise.flatten(-2)


def low_bits_ignored(seeds, shape):
    return RIGHT(seeds & ~0b11, shape)


def broken(seeds, shape):
    noise = RIGHT(seeds, shape)
    noise[0, 0, 0] = float("nan")
    return noise


WRONG = [
    (scaled, "variance"),
    (scaled, "Kolmogorov-Smirnov"),
    (shifted, "mean"),
    (shifted, "Kolmogorov-Smirnov"),
    (skewed, "skewness"),
    (tails_cut, "kurtosis"),
    (tails_cut, "draws beyond 3"),
    (tails_shifted, "draws beyond 3"),
    (beyond_the_largest, "largest magnitude"),
    (words_used_twice, "correlation in a group"),
    (radius_shared, "correlation of squares"),
    (low_bits_ignored, "correlation of seeds"),
]


@pytest.mark.parametrize(("wrong", "check"), WRONG, ids=[f"{wrong.__name__}, {check}" for wrong, check in WRONG])
def test_a_wrong_distribution_fails(monkeypatch, wrong, check):
    """Even where the definition itself is wrong, so that no error against it shows."""
    monkeypatch.setattr(noise_statistics, "normal_noise", wrong)
    monkeypatch.setattr(noise_statistics, "exact_noise", lambda seeds, count: wrong(seeds, (count,)).double())
    _, checks = noise_statistics.measure(DRAWS, torch.device("cpu"))
    failed = [row.name for row in checks if not row.passed]
    assert any(name.startswith(check) for name in failed), failed


def test_the_failed_checks_are_named(monkeypatch, capsys):
    # A variance of 1.01 is two standard deviations at this number of draws; the comparison with float64 sees it.
    monkeypatch.setattr(noise_statistics, "normal_noise", lambda seeds, shape: RIGHT(seeds, shape) * math.sqrt(1.01))
    assert noise_statistics.main(["--draws", str(DRAWS), "--device", "cpu"]) == 1
    assert "failed: largest error against float64" in capsys.readouterr().err


def test_nan_fails(monkeypatch):
    monkeypatch.setattr(noise_statistics, "normal_noise", broken)
    _, checks = noise_statistics.measure(DRAWS, torch.device("cpu"))
    assert [row.name for row in checks if not row.passed] == [
        "largest error against float64",
        "mean error against float64",
    ]


@pytest.mark.parametrize("draws", ["0", "-1", "1e20", "nan"])
def test_senseless_numbers_of_draws_are_refused(draws, capsys):
    with pytest.raises(SystemExit):
        noise_statistics.main(["--draws", draws])
    assert "--draws must be between 1 and 1e12" in capsys.readouterr().err
