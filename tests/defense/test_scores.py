from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from denim.benchmarks.interval_coverage import coverage_of_differences, coverage_of_shares
from denim.defense import Interval, paired_difference, resubmission_curve, score
from denim.defense.scores import draws_needed

RUNS = 4000
ERROR = 4 * np.sqrt(0.94 * 0.06 / RUNS)

Z = 1.959963984540054  # the 97.5 % point of the standard normal


def bounds(values, low: float = 0, high: float = 1) -> tuple[float, float]:
    """The interval by the text of the method, from the images' own numbers."""
    numbers = np.asarray(values, dtype=float)
    mean = numbers.mean()
    unseen = Z**2 * max(mean - low, high - mean) ** 2
    half = Z * np.sqrt(((numbers - mean) ** 2).sum() + unseen) / len(numbers)
    return max(mean - half, low), min(mean + half, high)


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
    close(scores.mean, (4 + 3 + 2 + 0 + 2) / 20, *bounds([1, 0.75, 0.5, 0, 0.5]))
    close(scores.vote, 3 / 5, *bounds([1, 1, 0, 0, 1]))
    close(scores.worst, 1 / 5, *bounds([1, 0, 0, 0, 0]))


def test_intervals_at_the_ends_stay_inside_and_have_a_width():
    for right in (0, 1):
        interval = score(np.full((50, 3), right), np.ones(50, dtype=int)).worst
        assert interval.value == right
        assert 0 <= interval.low < interval.high <= 1


@pytest.mark.parametrize("images", [50, 200])
@pytest.mark.parametrize(("share", "spread"), [(0.5, 0.02), (0.9, 2), (0.9, np.inf), (0.99, 0.5), (0.999, np.inf)])
@pytest.mark.parametrize("draws", [1, 20])
def test_intervals_of_means_cover_the_truth(images, share, spread, draws):
    """At least 94 %, less four standard errors of the simulation."""
    covered, _ = coverage_of_shares(images, share, spread, draws, RUNS)
    assert covered >= 0.94 - ERROR


@pytest.mark.parametrize("images", [50, 200])
@pytest.mark.parametrize("differing", [0.5, 2, 5])
@pytest.mark.parametrize(("side", "draws", "size"), [(1, 1, 1), (1, 20, 0.3), (0.5, 1, 1)])
def test_intervals_of_rare_differences_cover_the_truth(images, differing, side, draws, size):
    covered, _ = coverage_of_differences(images, differing / images, side, draws, size, RUNS)
    assert covered >= 0.94 - ERROR


def test_intervals_of_shares_are_narrower_than_those_of_coins():
    """Wilson's interval counts a share as a coin: here it is twice as wide, which costs four times the images."""
    _, width = coverage_of_shares(500, 0.95, np.inf, 20, RUNS)
    low, high = proportion_confint(475, 500, method="wilson")
    assert width < 0.5 * (high - low)
    # Coins themselves: not wider than Wilson's by more than the term for what has not been seen.
    _, width = coverage_of_shares(500, 0.5, np.inf, 1, RUNS)
    low, high = proportion_confint(250, 500, method="wilson")
    assert width < 1.02 * (high - low)


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


def test_the_paired_difference_by_hand():
    rng = np.random.default_rng(1)
    first = rng.integers(0, 21, 40) / 20
    second = np.clip(first + rng.normal(0.1, 0.2, 40), 0, 1)
    interval = paired_difference(first, second)
    close(interval, float((first - second).mean()), *bounds(first - second, -1, 1))
    close(paired_difference(second, first), -interval.value, -interval.high, -interval.low)


def test_pairing_is_what_makes_it_sharp():
    first = np.tile([0.02, 0.98], 200)
    paired, mean = paired_difference(first, first - 0.01), score(np.tile([[0], [1]], (200, 1)), [1] * 400).mean
    assert paired.high - paired.low < 0.2 * (mean.high - mean.low)


def test_equal_images_leave_what_400_images_cannot_tell():
    close(paired_difference([0.5] * 400, [0.5] * 400), 0, -(Z**2) / 400, Z**2 / 400)


# Resubmission


def test_the_resubmission_curve_by_counting_all_subsets():
    predictions = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 2, 1, 1], [2, 2, 2, 2], [0, 0, 1, 0]])
    right = predictions == 1
    curve = resubmission_curve(predictions, [1] * 5)
    assert len(curve) == 4
    for tries, interval in enumerate(curve, start=1):
        chances = [np.mean([row[list(chosen)].all() for chosen in combinations(range(4), tries)]) for row in right]
        close(interval, float(np.mean(chances)), *bounds(chances))


@pytest.mark.parametrize("draws", [1, 7, 20])
def test_the_resubmission_curve_falls_from_the_mean_to_the_worst(draws):
    predictions = np.random.default_rng(0).integers(0, 2, (30, draws))
    predictions[:10] = 1
    curve, scores = resubmission_curve(predictions, [1] * 30), score(predictions, [1] * 30)
    assert str(curve[0]) == str(scores.mean)
    assert str(curve[-1]) == str(scores.worst)
    assert all(one.value >= other.value for one, other in pairwise(curve))


# Bad input


@pytest.mark.parametrize("function", [score, resubmission_curve])
@pytest.mark.parametrize(
    ("predictions", "labels", "words"),
    [
        ([[0, 1], [2, 5]], [0, 1], "predictions of 3 classes count from 0, got 5 in 1 of 4 places"),
        ([[0, 1], [2, -1]], [0, 1], "predictions of 3 classes count from 0, got -1 in 1 of 4 places"),
        ([[0, 1], [2, 2]], [3, 7], "labels of 3 classes count from 0, got 3, 7 in 2 of 2 places"),
        ([[0.5, float("nan")]], [0], "predictions must be whole numbers of classes, got float64"),
        ([[0, 1]], [1.0], "labels must be whole numbers of classes, got float64"),
    ],
)
def test_classes_out_of_range_are_refused(function, predictions, labels, words):
    with pytest.raises(ValueError, match=words):
        function(predictions, labels, 3)


@pytest.mark.parametrize(("predictions", "labels"), [([[-1, 0]], [0]), ([[0, 0]], [-1])])
def test_negative_classes_are_refused_without_a_number_of_classes(predictions, labels):
    with pytest.raises(ValueError, match="of classes count from 0, got -1"):
        score(predictions, labels)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.1])
def test_differences_of_what_is_no_share_are_refused(bad):
    with pytest.raises(ValueError, match=r"second must have shares in \[0, 1\]"):
        paired_difference([0.5, 1.0], [0.5, bad])


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.5], [0.5]), ([], []), ([0.5, 1, 0], [0.5]), ([0.5, 1, 0], [0.5, 1]), ([[0.5, 1]], [[0.5, 1]])],
)
def test_differences_of_other_images_are_refused(first, second):
    with pytest.raises(ValueError, match="paired_difference takes two sequences of the same 2 or more images"):
        paired_difference(first, second)


def test_an_interval_prints_percent():
    assert str(Interval(0.5, 0.4012, 0.5988)) == "50.0 [40.1, 59.9]"


# Number of draws


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 1.0), (1.0, 1.0), (0.5, 0.3), (0.05, 0.1)])
@pytest.mark.parametrize("images", [200, 10**9])
def test_draws_are_the_fewest_with_which_intervals_are_5_percent_wider(alpha, beta, images):
    generator = np.random.default_rng(0)
    chances = generator.beta(alpha, beta, 200_000)
    found = draws_needed(generator.random((len(chances), 6)) < chances[:, None], images)
    mean = alpha / (alpha + beta)
    between = mean * (1 - mean) / (alpha + beta + 1)  # variance of a beta distribution
    within = mean * (1 - mean) - between
    unseen = (Z * max(mean, 1 - mean)) ** 2 / images

    def wider(draws: float) -> float:
        return math.sqrt((between + within / draws + unseen) / (between + unseen)) - 1

    # The pilot's own error: a draw more or less than the exact number moves this by less than 0.005.
    assert wider(found) < 0.055
    assert found == 4 or wider(found - 1) > 0.045


def test_intervals_of_the_chosen_draws_are_as_wide_as_said():
    """The interval that `score` gives, beside that of a hundred times the draws."""
    generator = np.random.default_rng(1)
    chances = generator.beta(1.0, 1.0, 4000)
    hits = generator.random((4000, 1000)) < chances[:, None]
    draws = draws_needed(hits[:500, :20], 4000)
    few, many = (score((~hits[:, :count]).astype(int), np.zeros(4000, int)).mean for count in (draws, 1000))
    assert 10 < draws < 30
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(1.05, abs=0.01)


def test_draws_have_bounds():
    assert draws_needed(np.repeat([[True], [False]], 20, axis=1), 100) == 4
    coins = np.random.default_rng(0).random((50, 20)) < 0.5
    assert draws_needed(coins, 10**6) == 100


@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (20,)])
def test_a_pilot_of_one_image_or_one_draw_is_refused(shape):
    with pytest.raises(ValueError, match="takes 2 or more images and draws"):
        draws_needed(np.ones(shape, bool), 10)
