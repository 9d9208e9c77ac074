import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from denim.benchmarks.certification import exact, population, simulated
from denim.defense.sequential import Estimation, lower_bound

ALPHA = 0.001


@pytest.mark.parametrize("draws", [1, 50, 9_999, 100_000])
def test_the_bound_is_that_of_clopper_and_pearson(draws):
    counts = np.unique(np.linspace(0, draws, 7).round().astype(int))
    ours = lower_bound(counts, draws, ALPHA)
    for count, bound in zip(counts.tolist(), ours, strict=True):
        # Both libraries state intervals of two sides, or of one at that confidence.
        scipy = stats.binomtest(count, draws, alternative="greater").proportion_ci(1 - ALPHA, "exact").low
        other = proportion_confint(count, draws, alpha=2 * ALPHA, method="beta")[0]
        assert bound == pytest.approx(scipy, rel=1e-9, abs=1e-12)
        assert bound == pytest.approx(other if count else 0.0, rel=1e-12)


@pytest.mark.parametrize("draws", [1, 49, 50, 60, 1_000, 10_000, 100_000])
def test_looks_end_at_all_draws_and_their_errors_sum_to_alpha(draws):
    for estimation in (Estimation(draws, ALPHA, (1.0,)), Estimation(draws, ALPHA, tolerance=0.1)):
        assert estimation.looks[-1] == draws
        assert list(estimation.looks) == sorted(set(estimation.looks))
        assert len(estimation.errors) == len(estimation.looks)
        assert sum(estimation.errors) == pytest.approx(ALPHA, rel=1e-12)
    reference = Estimation(draws, ALPHA)
    assert (reference.looks, reference.errors) == ((draws,), (ALPHA,))


def test_the_largest_radius_is_that_of_an_image_without_a_miss():
    assert Estimation(10_000, ALPHA).largest_radius == pytest.approx(stats.norm.ppf(ALPHA ** (1 / 10_000)), rel=1e-9)
    assert Estimation(5, ALPHA).largest_radius == 0
    # Half of alpha is for the last look.
    sequential = Estimation(10_000, ALPHA, (1.0,)).largest_radius
    assert sequential == pytest.approx(stats.norm.ppf((ALPHA / 2) ** (1 / 10_000)), rel=1e-9)


@pytest.mark.parametrize("draws", [100, 1_000, 10_000])
@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0, 2.0])
def test_the_exact_chance_of_a_false_certificate_is_below_alpha(draws, radius):
    estimation = Estimation(draws, ALPHA, (radius,))
    boundary = float(stats.norm.cdf(radius))  # the radius is that of the image: one that is larger would be false
    hard = exact(estimation, boundary, gives_up=False).certified
    assert hard <= ALPHA
    assert exact(estimation, boundary).certified <= hard
    # The bound is not idle: bounds at alpha, looked at as often, are false more often than that.
    naive = Estimation(draws, ALPHA, (radius,))
    object.__setattr__(naive, "errors", (ALPHA,) * len(naive.looks))
    assert draws < 1_000 or exact(naive, boundary, gives_up=False).certified > 1.2 * ALPHA


def test_simulation_and_exact_computation_agree():
    estimation = Estimation(1_000, 0.05, (1.0,))
    for chance in (stats.norm.cdf(1.0), 0.87, 0.8):
        expected = exact(estimation, float(chance))
        certified, draws = simulated(estimation, np.full(4_000, chance), seed=3)
        error = np.sqrt(expected.certified * (1 - expected.certified) / 4_000)
        assert abs(certified.mean() - expected.certified) < 4 * error
        assert abs(draws.mean() - expected.draws) < 4 * draws.std() / np.sqrt(4_000)


@pytest.mark.parametrize("draws", [10_000, 100_000])
@pytest.mark.parametrize("name", ["robust", "middling", "mixed"])
def test_a_decision_at_a_radius_takes_few_draws_and_loses_few_certificates(draws, name):
    chances = population(name, 4_000)
    certified, spent = simulated(Estimation(draws, ALPHA, (1.0,)), chances)
    assert spent.mean() + 100 < draws / (7 if draws == 10_000 else 10)
    reference = Estimation(draws, ALPHA)
    successes = np.random.default_rng(1).binomial(draws, chances)
    full = reference.radius(reference.bound(0, successes)) >= 1.0
    # One point, and three standard errors of the difference of two runs, whose images at the edge differ.
    edge = (np.abs(chances - stats.norm.cdf(1.0)) < 0.01).mean()
    assert full.mean() - certified.mean() < 0.01 + 3 * np.sqrt(edge / len(chances))


def test_an_estimation_stops_within_its_tolerance_of_what_all_draws_give():
    tolerance, chances = 0.15, population("middling", 500)
    estimation, reference = Estimation(10_000, ALPHA, tolerance=tolerance), Estimation(10_000, ALPHA)
    rng = np.random.default_rng(0)
    grown, spent = [], []
    for chance in chances:
        draws = rng.random(10_000) < chance
        bound, counts = 0.0, np.cumsum(draws)
        for look, count in enumerate(estimation.looks):
            bound = max(bound, float(estimation.bound(look, counts[count - 1])))
            if estimation.enough(look, counts[count - 1], bound):
                break
        spent.append(count)
        grown.append(float(reference.radius(reference.bound(0, counts[-1])) - estimation.radius(bound)))
    # Two standard errors of optimism are exceeded by one image in 40; alpha at one look instead of many adds a little.
    assert np.mean(np.array(grown) > tolerance + 0.05) < 0.04
    assert np.mean(spent) < 4_000


def test_several_radii_stop_when_the_last_is_decided():
    estimation = Estimation(10_000, ALPHA, (0.0, 1.0))
    look = 10  # after 689 draws
    assert estimation.enough(look, 689, estimation.bound(look, 689))  # certified at both
    assert estimation.enough(look, 200, estimation.bound(look, 200))  # at neither
    assert estimation.enough(look, 420, estimation.bound(look, 420))  # at the first
    assert not estimation.enough(look, 350, estimation.bound(look, 350))  # 1/2 is not decided
    assert not estimation.enough(look, 585, estimation.bound(look, 585))  # Phi(1) = 0.841 is not decided
    last = len(estimation.looks) - 1
    assert estimation.enough(last, 5_000, estimation.bound(last, 5_000))
