"""A step about a unit of several rows, against dp-accounting's slower construction."""

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism
from scipy.stats import binom

from utils.privacy.mixtures import MixtureStep


@pytest.mark.parametrize(
    ("q", "sigma", "rows", "interval"),
    [
        (4096 / 180_000, 1.125, 2, 1e-2),
        (4096 / 180_000, 0.808, 16, 2e-2),
        (0.5, 0.3, 20, 0.5),
        (0.9, 3.0, 5, 1e-2),
        (0.001, 0.5, 3, 1e-2),
    ],
)
def test_the_distribution_is_dp_accountings(q, sigma, rows, interval):
    weights = binom.pmf(np.arange(rows + 1), rows, q)
    theirs = from_mixture_gaussian_mechanism(
        sigma, range(rows + 1), weights, value_discretization_interval=interval
    )
    step = MixtureStep(q, sigma, rows)
    ours = step.distribution(interval)
    for side in ("_pmf_remove", "_pmf_add"):
        mine, other = getattr(ours, side), getattr(theirs, side)
        for epsilon in interval * np.arange(0, mine.size, max(1, mine.size // 50)):
            exact = other.get_delta_for_epsilon(epsilon)
            assert mine.get_delta_for_epsilon(epsilon) == pytest.approx(exact, rel=1e-5, abs=1e-13)
        width, _ = step.spread()
        assert mine.size * interval <= width + 3 * interval


def test_the_spread_is_the_variance_of_the_loss():
    step = MixtureStep(0.2, 1.5, 4)
    pmf = step.distribution(1e-3)._pmf_remove.to_dense_pmf()
    losses = (np.arange(pmf.size) + pmf._lower_loss) * 1e-3
    assert step.spread()[1] == pytest.approx(np.sum(pmf._probs * losses**2), rel=1e-3)
