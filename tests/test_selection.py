"""Sharing a size out over bins, and choosing rows of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from resample_with_dp_histogram.selection import (
    allocate,
    choose_rows,
    largest_remainders,
    total_variation,
)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 500))
def test_whole_shares_add_up_and_are_nearest(weights, size):
    weights = np.array(weights) + 1e-9
    shares = weights / weights.sum()
    counts = largest_remainders(shares, size)
    assert counts.sum() == size
    assert (np.abs(counts - shares * size) < 1).all()


def test_what_a_bin_without_any_row_asks_for_is_overflow_too():
    found = allocate(np.array([0.5, 0.5]), np.array([10, 0]), 10, largest_remainders)
    assert found.counts.tolist() == [10, 0]
    assert (found.overflow, found.from_empty_bins) == (5, 0)
    found = allocate(np.array([0.0, 0.1]), np.array([1, 0]), 1, largest_remainders)
    assert (found.overflow, found.from_empty_bins) == (1, 1)


def test_overflow_goes_to_other_bins_by_their_weight_and_is_counted():
    found = allocate(np.array([6.0, 3.0, 1.0]), np.array([2, 100, 100]), 20, largest_remainders)
    # 12 asked of the first bin, which has 2; the other ten are shared out 3 to 1.
    assert found.counts.tolist() == [2, 14, 4]
    assert (found.overflow, found.from_empty_bins) == (10, 0)
    found = allocate(np.array([6.0, 3.0, 1.0]), np.array([12, 6, 2]), 20, largest_remainders)
    assert found.counts.tolist() == [12, 6, 2]
    assert (found.overflow, found.from_empty_bins) == (0, 0)


def test_bins_without_weight_are_the_last_resort():
    weights, capacities = np.array([1.0, 1.0, 0.0, 0.0]), np.array([3, 5, 20, 10])
    found = allocate(weights, capacities, 11, largest_remainders)
    assert found.counts.tolist() == [3, 5, 2, 1]
    assert (found.overflow, found.from_empty_bins) == (3, 3)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1, 7]), st.integers(0, 9)), min_size=1),
    st.floats(0, 1),
)
def test_the_size_is_met_and_no_bin_gives_more_than_it_has(bins, share):
    weights, capacities = map(np.array, zip(*bins))
    weights = weights + (weights.sum() == 0)
    size = int(share * capacities.sum())
    found = allocate(weights, capacities, size, largest_remainders)
    assert found.counts.sum() == size
    assert (found.counts <= capacities).all()
    assert (found.counts >= 0).all()
    assert 0 <= found.from_empty_bins <= found.overflow <= size


def test_drawn_bins_follow_the_histogram_and_scatter_as_draws_do():
    random, weights = np.random.default_rng(0), np.array([5.0, 3.0, 2.0])

    def share(probabilities, size):
        return random.multinomial(size, probabilities)

    drawn = np.stack(
        [allocate(weights, np.array([999] * 3), 100, share).counts for _ in range(500)]
    )
    assert stats.chisquare(drawn.sum(0), 5000 * weights).pvalue > 1e-4
    assert np.var(drawn[:, 0]) == pytest.approx(25, rel=0.3)


def test_rows_come_from_their_bins_once_before_twice():
    bins = np.random.default_rng(0).integers(0, 5, 200)
    counts = np.array([10, 0, 30, 100, 5])
    rows = choose_rows(bins, counts, np.random.default_rng(1))
    assert np.bincount(bins[rows], minlength=5).tolist() == counts.tolist()
    copies = np.bincount(rows, minlength=200)
    for bin, count in enumerate(counts):
        size = (bins == bin).sum()
        assert copies[bins == bin].max() == -(-count // size)
        assert copies[bins == bin].min() == count // size
    # In no order that a reader could take for one.
    assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.3
    assert (rows == choose_rows(bins, counts, np.random.default_rng(1))).all()


def test_every_row_of_a_bin_is_as_likely():
    bins, random = np.array([0] * 5 + [1] * 5), np.random.default_rng(0)
    taken = np.zeros(10)
    for _ in range(2000):
        taken[choose_rows(bins, np.array([2, 3]), random)] += 1
    expected = np.repeat([800, 1200], 5)
    assert stats.chisquare(taken, expected).pvalue > 1e-4


def test_total_variation():
    assert total_variation(np.array([1, 3]), np.array([100, 300])) == 0
    assert total_variation(np.array([1, 0]), np.array([0, 7])) == 1
    assert total_variation(np.array([1, 1]), np.array([3, 1])) == pytest.approx(0.25)
