"""The noisy histogram: the right noise, on the grid; and its projection onto the simplex."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from resample_with_dp_histogram.histogram import noisy_histogram, project_to_simplex
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
