from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from denim.defense import Interval, paired_difference, score

Z = 1.959963984540054  # the 97.5 % point of the standard normal


def wilson(successes: float, images: int) -> tuple[float, float]:
    """Wilson 1927: the shares p with |p_hat - p| <= z sqrt(p (1 - p) / n), from the quadratic equation."""
    share = successes / images
    centre = (share + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * np.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    return centre - half, centre + half


def close(interval: Interval, value: float, low: float, high: float) -> None:
    # Both sides are float64 arithmetic of a dozen operations.
    assert (interval.value, interval.low, interval.high) == pytest.approx((value, low, high), rel=0, abs=1e-12)


def test_scores_by_hand():
    predictions = [
        [1, 1, 1, 1],  # all right
        [1, 1, 1, 0],  # vote right, worst lost
        [0, 0, 1, 1],  # a tie is lost
        [2, 2, 2, 2],  # all wrong
        [2, 1, 0, 1],  # a plurality without a majority wins
    ]
    scores = score(predictions, [1, 1, 1, 1, 1])
    assert (scores.num_images, scores.score_draws) == (5, 4)
    close(scores.mean, (4 + 3 + 2 + 0 + 2) / 20, *wilson(11 / 4, 5))
    close(scores.vote, 3 / 5, *wilson(3, 5))
    close(scores.worst, 1 / 5, *wilson(1, 5))


def test_wilson_intervals_against_published_digits():
    # Newcombe 1998, table I (Statistics in Medicine 17, 857-872), method 3, printed with four decimals.
    for successes, images, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = score((np.arange(images)[:, None] < successes).astype(int), np.ones(images, dtype=int)).mean
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_intervals_at_the_ends_stay_inside_and_have_a_width():
    for right in (0, 1):
        interval = score(np.full((50, 3), right), np.ones(50, dtype=int)).worst
        assert interval.value == right
        assert 0 <= interval.low < interval.high <= 1


IMAGES, RUNS = 200, 2000


def covered(right: np.ndarray, share: float) -> float:
    """Share of simulated evaluations (RUNS, IMAGES, R) whose interval holds the true value."""
    intervals = [score(run, np.ones(IMAGES, dtype=int)).mean for run in right.astype(int)]
    return float(np.mean([interval.low <= share <= interval.high for interval in intervals]))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_intervals_of_coins_cover_the_truth(share):
    right = np.random.default_rng(0).random((RUNS, IMAGES, 1)) < share
    counts = np.arange(IMAGES + 1)
    inside = [low <= share <= high for low, high in (wilson(count, IMAGES) for count in counts)]
    exact = stats.binom.pmf(counts, IMAGES, share)[inside].sum()
    assert exact == pytest.approx(0.95, abs=0.02)  # counts are whole numbers: no interval of 200 has 95 % exactly
    assert covered(right, share) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / RUNS))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("spread", [0.5, 4])
def test_intervals_of_means_over_draws_cover_the_truth(share, spread):
    """Images of different difficulty, 5 draws of each: at least 95 %, less four standard errors of the simulation."""
    rng = np.random.default_rng(0)
    chances = rng.beta(share * spread, (1 - share) * spread, (RUNS, IMAGES, 1))
    right = rng.random((RUNS, IMAGES, 5)) < chances
    assert covered(right, share) >= 0.95 - 4 * np.sqrt(0.95 * 0.05 / RUNS)


def test_a_vote_needs_more_than_every_other_class():
    # True class 0 with 2 of 5 votes: it wins against 2 + 1 + ... only where no other class has as many.
    assert score([[0, 0, 1, 2, 3]], [0]).vote.value == 1
    assert score([[0, 0, 1, 1, 3]], [0]).vote.value == 0
    assert score([[0, 1, 1, 1, 3]], [0]).vote.value == 0
    assert score([[3, 3, 1]], [7]).vote.value == 0, "a label that no draw gives"


def test_one_draw_has_three_equal_scores():
    scores = score([[0], [1], [1]], [0, 1, 0])
    assert scores.mean == scores.vote == scores.worst


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([], []), ([[]], [0]), ([0, 1], [0, 1]), ([[0], [1]], [0]), ([[0], [1]], [[0], [1]])],
)
def test_shapes_that_do_not_fit_are_refused(predictions, labels):
    with pytest.raises(ValueError, match=r"predictions \(N, R\) and labels \(N,\), got"):
        score(predictions, labels)


def test_the_paired_difference_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    first = rng.integers(0, 21, 40) / 20
    second = np.clip(first + rng.normal(0.1, 0.2, 40), 0, 1)
    interval = paired_difference(first, second)
    test = stats.ttest_rel(first, second)
    expected = test.confidence_interval(0.95)
    close(interval, float((first - second).mean()), expected.low, expected.high)
    swapped = paired_difference(second, first)
    close(swapped, -interval.value, -interval.high, -interval.low)


def test_pairing_is_what_makes_it_sharp():
    rng = np.random.default_rng(1)
    first = rng.random(100)
    interval = paired_difference(first, first - 0.01)
    close(interval, 0.01, 0.01, 0.01)


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.5], [0.5]), ([], []), ([0.5, 1, 0], [0.5]), ([0.5, 1, 0], [0.5, 1]), ([[0.5, 1]], [[0.5, 1]])],
)
def test_differences_of_other_images_are_refused(first, second):
    with pytest.raises(ValueError, match="paired_difference takes two sequences of the same 2 or more images"):
        paired_difference(first, second)


def test_an_interval_prints_percent():
    assert str(Interval(0.5, 0.4012, 0.5988)) == "50.0 [40.1, 59.9]"
