from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from denim.nim.sigma import Sigma

LEVEL = st.floats(0, 1e4)
POSITIVE = st.floats(1e-3, 1e2)  # concentration and scale: their product is a level
SIGMAS = st.one_of(
    LEVEL.map(lambda level: Sigma("constant", (level,))),
    st.tuples(POSITIVE, POSITIVE).map(lambda values: Sigma("gamma", values)),
    st.tuples(LEVEL, LEVEL).map(lambda values: Sigma("uniform", tuple(sorted(values)))),
)


@pytest.mark.parametrize(
    ("text", "kind", "values", "canonical"),
    [
        ("70", "constant", (70.0,), "70"),
        (70, "constant", (70.0,), "70"),
        (0.5, "constant", (0.5,), "0.5"),
        ("0", "constant", (0.0,), "0"),
        ("gamma:25,3", "gamma", (25.0, 3.0), "gamma:25,3"),
        ("gamma: 25, 3.0", "gamma", (25.0, 3.0), "gamma:25,3"),
        ("uniform:0,30", "uniform", (0.0, 30.0), "uniform:0,30"),
        ("uniform:30,30", "uniform", (30.0, 30.0), "uniform:30,30"),
    ],
)
def test_text_forms(text, kind, values, canonical):
    sigma = Sigma.parse(text)
    assert sigma == Sigma(kind, values)
    assert str(sigma) == canonical


@given(SIGMAS)
def test_text_form_loses_nothing(sigma):
    assert Sigma.parse(str(sigma)) == sigma


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a number"),
        ("seventy", "is not a number"),
        ("gauss:1,2", "gamma:CONCENTRATION,SCALE"),
        ("gamma:25", "gamma:CONCENTRATION,SCALE"),
        ("gamma:25,3,1", "gamma:CONCENTRATION,SCALE"),
        ("gamma:", "gamma:CONCENTRATION,SCALE"),
        ("uniform:0;30", "uniform:LOW,HIGH"),
        ("10,20", "is not a number"),
        ("-1", "finite and not negative"),
        ("nan", "finite and not negative"),
        ("inf", "finite and not negative"),
        ("uniform:-5,30", "finite and not negative"),
        ("10001", "at most 10000"),
        ("uniform:0,10001", "at most 10000"),
        ("gamma:5000,3", "the mean, concentration times scale, must be at most 10000"),
        ("gamma:0,3", "must be positive"),
        ("gamma:25,0", "must be positive"),
        ("uniform:30,0", "the lower end is above the upper end"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Sigma.parse(text)


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("gamma:25,3", stats.gamma(25, scale=3)),
        ("gamma:0.5,40", stats.gamma(0.5, scale=40)),
        ("uniform:0,30", stats.uniform(0, 30)),
        ("uniform:5,150", stats.uniform(5, 145)),
    ],
)
def test_distribution(text, distribution):
    count = 100_000
    levels = Sigma.parse(text).sample(torch.arange(count))
    assert levels.dtype == torch.float32
    assert levels.shape == (count,)
    values = levels.double().numpy()
    # The draws are fixed, so these hold always or never; bounds are five standard errors of mean and variance.
    variance, kurtosis = distribution.var(), float(distribution.stats("k"))
    assert abs(values.mean() - distribution.mean()) < 5 * (variance / count) ** 0.5
    assert abs(values.var() - variance) < 5 * variance * ((kurtosis + 2) / count) ** 0.5
    assert stats.kstest(values, distribution.cdf).pvalue > 1e-3


def test_published_default_has_mean_75_and_deviation_15():
    levels = Sigma.parse("gamma:25,3").sample(torch.arange(100_000)).double()
    assert levels.mean().item() == pytest.approx(75, abs=5 * 15 / 100_000**0.5)
    # Relative standard error of a deviation: sqrt((kurtosis + 2) / 4 n), excess kurtosis 6 / 25.
    assert levels.std().item() == pytest.approx(15, rel=5 * (2.24 / 4 / 100_000) ** 0.5)


@given(SIGMAS, st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_a_level_is_a_function_of_its_seed(sigma, seeds):
    seeds = torch.tensor(seeds)
    levels = sigma.sample(seeds)
    assert levels.isfinite().all()
    assert (levels >= 0).all()
    assert torch.equal(sigma.sample(seeds.flip(0)).flip(0), levels)
    assert torch.equal(torch.cat([sigma.sample(seed[None]) for seed in seeds]), levels)
    if sigma.kind == "uniform":
        low, high = (torch.tensor(value, dtype=torch.float32) for value in sigma.values)
        assert (levels >= low).all()
        assert (levels <= high).all()


@pytest.mark.parametrize("text", ["70", "gamma:25,3", "uniform:0,30"])
def test_the_global_generator_is_left_alone(text, global_rng_untouched):
    Sigma.parse(text).sample(torch.arange(10))


@pytest.mark.parametrize("text", ["0.3", 0.25, "uniform:0,0.5", "gamma:25,0.01"])
def test_levels_as_if_of_images_in_0_to_1_are_warned_of(text):
    with pytest.warns(UserWarning, match=r"less than one level; for .* of images in \[0, 1\] give \d"):
        Sigma.parse(text)


@pytest.mark.parametrize("text", ["0", "1", "70", "uniform:0,30", "uniform:0,0", "gamma:25,3"])
def test_usual_levels_are_not_warned_of(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sigma.parse(text)
