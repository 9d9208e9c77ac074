import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from denim.nim.data import Order, order
from denim.nim.data.order import TABLE

pytestmark = pytest.mark.slow

INT64 = st.integers(-(2**63), 2**63 - 1)
EDGES = [k + d for k in (1, 2, 4, 256, 1024, 4096) for d in (0, 1)] + [7, 97, 4093]

# Pass or fail of fixed draws, for good; this is the chance that a correct order had of failing when seeds were chosen.
LEVEL = 1e-3


def limited(table, *key):
    """An order that is a table up to so many samples: 0 makes a network of every one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "TABLE", table)
        return Order(*key)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000) | st.sampled_from(EDGES), seed=INT64, epoch=st.integers(0, 2**63 - 1))
@example(count=1, seed=0, epoch=0)
@example(count=2, seed=-1, epoch=1)
def test_order_is_a_permutation(count, seed, epoch):
    for table in (0, TABLE):
        found = limited(table, count, seed, epoch).at(np.arange(count))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("count", [TABLE - 1, TABLE, TABLE + 1, 99_991, 1 << 17, (1 << 17) + 1])
def test_order_is_a_permutation_on_both_sides_of_the_table(count):
    found = Order(count, 3, 4).at(np.arange(count))
    np.testing.assert_array_equal(np.sort(found), np.arange(count))
    assert (found != np.arange(count)).mean() > 0.99


@settings(max_examples=20, deadline=None)
@given(seed=INT64, epoch=st.integers(0, 10**6), start=st.integers(0, 10**9 - 40), rows=st.lists(st.integers(0, 39)))
def test_a_position_has_its_sample_in_whatever_company(seed, epoch, start, rows):
    whole = Order(10**9, seed, epoch).at(np.arange(start, start + 40))
    np.testing.assert_array_equal(
        Order(10**9, seed, epoch).at(start + np.array(rows, dtype=np.int64)), whole[np.array(rows, dtype=np.int64)]
    )
    assert len(set(whole.tolist())) == 40


COUNT = 99_991  # a prime, so A * B > count and some numbers go through twice
ROW = 316  # numbers in a row of the network's rectangle: B


@pytest.fixture(scope="module")
def starts():
    """Samples at chosen positions of 6000 orders: positions (P,) -> (seeds 3000, epochs 2, P)."""
    orders = [[Order(COUNT, seed, epoch) for epoch in (0, 1)] for seed in range(3000)]

    def at(*positions):
        return np.array([[one.at(np.array(positions)) for one in pair] for pair in orders])

    return at


def uniform(values, count, bins):
    """p-value of a chi-square test that values are uniform on range(count)."""
    edges = np.linspace(0, count, bins + 1).round()
    expected = np.diff(edges) / count * values.size
    return stats.chisquare(np.histogram(values, edges)[0], expected).pvalue


def independent(first, second):
    """p-value that two samples are uniform and independent, in 8 x 8 bins."""
    table = np.histogram2d(first.ravel(), second.ravel(), 8, [(0, COUNT), (0, COUNT)])[0]
    return stats.chisquare(table.ravel()).pvalue


def test_every_position_gets_every_sample_alike(starts):
    # The corners of the network's rectangle and a place inside.
    for sample in np.moveaxis(starts(0, 1, ROW, COUNT // 2, COUNT - 1), -1, 0):
        assert uniform(sample, COUNT, 100) > LEVEL
        # The low digits are made by another round than the high ones.
        assert uniform(sample % ROW, ROW, 50) > LEVEL


def test_neighbours_at_the_start_are_not_neighbours_in_the_source(starts):
    # Positions next to each other share a in the network, positions ROW apart share b.
    base, beside, below, corner = np.moveaxis(starts(0, 1, ROW, ROW + 1), -1, 0)
    for other in (beside, below, corner):
        assert independent(base, other) > LEVEL
        distance = (other - base) % COUNT
        assert distance.min() > 0
        assert uniform(distance - 1, COUNT - 1, 100) > LEVEL
        assert uniform(distance % ROW, ROW, 50) > LEVEL
        assert uniform((other // ROW - base // ROW) % ROW, ROW, 40) > LEVEL
    # Four corners of a rectangle: what a network with too few rounds gives away.
    assert uniform((base - beside - below + corner) % COUNT, COUNT, 100) > LEVEL


def test_epochs_and_seeds_are_independent(starts):
    first = starts(5)[..., 0]
    assert independent(first[:, 0], first[:, 1]) > LEVEL
    assert independent(first[:-1, 0], first[1:, 0]) > LEVEL


def test_batches_are_fair_draws_without_replacement():
    batch = 256
    orders = [[Order(COUNT, seed, epoch).at(np.arange(batch)) for epoch in (0, 1)] for seed in range(1500)]
    low = np.array([np.count_nonzero(drawn < COUNT // 2) for pair in orders for drawn in pair])
    law = stats.hypergeom(COUNT, COUNT // 2, batch)
    edges = law.ppf(np.linspace(0, 1, 13)[1:-1])
    expected = np.diff([0, *law.cdf(edges), 1]) * len(low)
    assert stats.chisquare(np.bincount(np.searchsorted(edges, low), minlength=12), expected).pvalue > LEVEL
    # Samples in the first batch of one epoch and of the next.
    shared = sum(np.intersect1d(*pair).size for pair in orders)
    assert stats.poisson(len(orders) * batch**2 / COUNT).sf(shared - 1) > LEVEL
    assert stats.poisson(len(orders) * batch**2 / COUNT).cdf(shared) > LEVEL
    # Neighbours of the source next to each other, in either direction.
    pairs = sum(np.count_nonzero(abs(np.diff(drawn)) == 1) for pair in orders for drawn in pair)
    mean = 2 * len(orders) * (batch - 1) * 2 / COUNT
    assert min(stats.poisson(mean).sf(pairs - 1), stats.poisson(mean).cdf(pairs)) > LEVEL


def test_small_orders_are_uniform_over_all_permutations():
    tally = Counter(tuple(Order(4, seed, epoch).at(np.arange(4))) for seed in range(20) for epoch in range(240))
    assert len(tally) == 24
    assert stats.chisquare(list(tally.values())).pvalue > LEVEL


def test_order_is_pinned():
    """A run resumed with a later release must go on in the order in which it began."""
    assert Order(10, -7, 3).at(np.arange(10)).tolist() == [8, 7, 0, 1, 2, 3, 6, 4, 9, 5]
    assert Order(10**9, -7, 3).at(np.array([0, 1, 10**9 - 1])).tolist() == [70121985, 352741405, 660445350]


def test_a_billion_samples_take_no_memory():
    tracemalloc.start()
    try:
        Order(10**9, 0, 1).at(np.arange(10**9 - 4096, 10**9))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # some arrays of 4096; the permutation would be 8 GB


@pytest.mark.parametrize("count", [0, -1, (1 << 62) + 1])
def test_errors(count):
    with pytest.raises(ValueError, match=f"1 to 2\\^62 samples, got {count}"):
        Order(count, 0, 0)
