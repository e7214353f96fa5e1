"""The noisy histogram: the right noise, on the grid; and its projection onto the simplex."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from resample_with_dp_histogram.histogram import noisy_histogram, project_to_simplex, unit_weights
from utils.secure_random import SecureRandom, grid_spacing

counts = st.lists(st.floats(-100, 1000), min_size=1, max_size=12)


def test_counts_get_gaussian_noise_of_the_deviation_asked_for():
    bins, num_bins = np.arange(5000) % 7, 200_000
    noise = noisy_histogram(bins, num_bins, 10.0, SecureRandom())
    noise[:7] -= np.bincount(bins)
    # Two sides of a chi-square test: a false alarm in a million runs.
    statistic = (noise**2).sum() / 100
    assert stats.chi2.ppf(5e-7, num_bins) < statistic < stats.chi2.ppf(1 - 5e-7, num_bins)
    assert stats.kstest(noise / 10, "norm").pvalue > 1e-6


def test_noise_is_fresh_every_time_and_lies_on_the_public_grid():
    one, other = (noisy_histogram(np.zeros(9, int), 1000, 3.0, SecureRandom()) for _ in range(2))
    assert abs(np.corrcoef(one[1:], other[1:])[0, 1]) < 0.2
    spacing = grid_spacing(3.0)
    np.testing.assert_array_equal(one / spacing, np.rint(one / spacing))
    # About 912 on this grid, give or take 9; twice as coarse a grid leaves about 830.
    assert len(np.unique(one)) > 865


def test_without_noise_it_is_the_count():
    assert noisy_histogram(np.array([2, 0, 2]), 4, 0.0, SecureRandom()).tolist() == [1, 0, 2, 0]


def test_rows_of_a_unit_share_one_count():
    """A person with 1,000 rows weighs what a person with one weighs, and no more."""
    units = np.array([7] * 1000 + [3] + [5] * 4)
    weights = unit_weights(units)
    assert weights[1000] == 1
    assert (weights[1001:] == 0.25).all()
    assert 1 - 1e-6 < weights[:1000].sum() <= 1
    bins = np.arange(1005) % 3
    histogram = noisy_histogram(bins, 3, 0.0, SecureRandom(), units)
    assert histogram.sum() == pytest.approx(3, abs=1e-5)
    np.testing.assert_array_equal(histogram, np.bincount(bins, weights))


def test_every_row_a_unit_counts_as_rows_do():
    bins = np.random.default_rng(0).integers(0, 9, 500)
    units = np.random.default_rng(1).permutation(500)
    rows = noisy_histogram(bins, 9, 0.0, SecureRandom())
    np.testing.assert_array_equal(noisy_histogram(bins, 9, 0.0, SecureRandom(), units), rows)
    np.testing.assert_array_equal(rows, np.bincount(bins))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_a_unit_that_leaves_moves_the_histogram_by_its_weights_to_the_last_bit(rows, random):
    """By at most 1, whatever the order of the rows: sums of weights are exact."""
    units, bins = np.array(rows).T
    whole = noisy_histogram(bins, 6, 0.0, SecureRandom(), units)
    stays = units != units[0]
    order = np.array(random.sample(range(len(bins)), len(bins)))
    left = order[stays[order]]
    neighbour = noisy_histogram(bins[left], 6, 0.0, SecureRandom(), units[left])
    own = np.bincount(bins[~stays], unit_weights(units)[~stays], minlength=6)
    np.testing.assert_array_equal(whole - neighbour, own)
    assert 0 < np.linalg.norm(own) <= own.sum() <= 1


@pytest.mark.parametrize("size", [3, 7, 49, 1000, 10**6 + 3])
def test_the_weights_of_a_unit_never_exceed_1(size):
    """In exact arithmetic: 49 floats of 1/49 would add up to more than 1 in some order."""
    weight = Fraction(float(unit_weights(np.zeros(size, dtype=np.int64))[0]))
    assert 1 - Fraction(size, 2**30) <= size * weight <= 1


@given(counts, st.floats(0.5, 1e5))
def test_the_projection_is_the_nearest_point_of_the_simplex(values, total):
    values = np.array(values)
    projected = project_to_simplex(values, total)
    assert projected.min() >= 0
    assert projected.sum() == pytest.approx(total, rel=1e-9)
    # Optimality (KKT): one constant is subtracted where something is left, and no less elsewhere.
    constants = (values - projected)[projected > 0]
    assert np.ptp(constants) <= 1e-6 * max(1, total)
    assert (values[projected == 0] <= constants.max() + 1e-6 * max(1, total)).all()


def test_the_projection_agrees_with_a_general_solver():
    values = np.array([5.0, -3.0, 2.0, 0.5, 7.5])
    solved = optimize.minimize(
        lambda x: ((x - values) ** 2).sum(), np.full(5, 2.0), bounds=[(0, None)] * 5,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 10}, options={"ftol": 1e-12},
    ).x  # fmt: skip
    np.testing.assert_allclose(project_to_simplex(values, 10.0), solved, atol=1e-5)


def test_a_histogram_stays_as_it_is():
    np.testing.assert_allclose(project_to_simplex(np.array([3.0, 0.0, 5.0]), 8), [3, 0, 5])


def test_empty_bins_stay_near_empty_where_clamping_would_fill_them():
    true = np.zeros(1000)
    true[:50] = 400
    noisy = true + 10 * np.random.default_rng(0).normal(size=1000)
    clamped = np.maximum(noisy, 0)
    clamped *= true.sum() / clamped.sum()
    assert clamped[50:].sum() > 2500
    assert project_to_simplex(noisy, true.sum())[50:].sum() < 600
