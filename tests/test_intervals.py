"""Bootstrap intervals: as wide as theory says, of values that stay together."""

import numpy as np
import pytest

from evaluation.measures.intervals import (
    bootstrap,
    mean_and_spread,
    ratio_of_sums,
    share_interval,
)


@pytest.mark.parametrize("count", [400, 20_000])
def test_the_interval_of_a_mean_is_that_of_the_normal_distribution(count):
    """20,000 examples are resampled in several parts."""
    values = np.random.default_rng(1).normal(3.0, 2.0, count)
    low, high = bootstrap(values, statistic=np.mean)
    half = 1.96 * values.std() / np.sqrt(count)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)


def test_the_same_examples_are_drawn_of_every_column():
    """Were they drawn apart, a ratio of proportional columns would not be constant."""
    values = np.random.default_rng(2).uniform(1, 9, 50)
    assert bootstrap(3 * values, values, statistic=ratio_of_sums) == pytest.approx((3, 3))


def test_a_seed_gives_the_same_interval():
    values = np.arange(30.0)
    one, same, other = (bootstrap(values, statistic=np.mean, seed=s) for s in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0] * 50])
def test_examples_that_are_all_equal_have_an_interval_of_no_width(values):
    values = np.array(values)
    assert bootstrap(values, statistic=np.mean) == (values[0], values[0])
    assert bootstrap(values, np.full(len(values), 2.0), statistic=ratio_of_sums) == (
        values[0] / 2, values[0] / 2,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 20, 3000])
def test_none_and_all_have_exact_intervals(count):
    """Clopper and Pearson 1934: none of n is as likely as 2.5% at 1 - 0.025^(1/n)."""
    most = 1 - 0.025 ** (1 / count)
    assert share_interval(np.zeros(count)) == (0.0, pytest.approx(most))
    assert share_interval(np.ones(count)) == (pytest.approx(1 - most), 1.0)


def test_other_shares_are_resampled():
    for values in ([0.0, 1.0, 1.0], [0.5, 0.5]):
        values = np.array(values)
        assert share_interval(values) == bootstrap(values, statistic=np.mean)


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)
    assert mean_and_spread([4.0]) == (4.0, 4.0, 4.0)
