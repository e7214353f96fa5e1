"""MAUVE against closed forms, and the order in which it puts sets of texts."""

import math

import numpy as np
import pytest
from scipy import integrate

from evaluation.measures.mauve import frontier_area, mauve
from tests.resampling import unit_vectors

P = np.array([0.5, 0.3, 0.2, 0.0])


def test_equal_distributions_have_area_1():
    assert frontier_area(P, P) == pytest.approx(1, abs=1e-12)


def test_disjoint_distributions_have_the_area_of_the_beta_integral():
    area = frontier_area(P, np.array([0.0, 0, 0, 1]))
    assert area == pytest.approx(1 / math.comb(10, 5), rel=2e-3)


def test_the_area_is_that_of_the_curve():
    """Against the integral of y dx by quadrature, for distributions that overlap in part."""
    q = np.array([0.1, 0.3, 0.4, 0.2])

    def frontier(weight):
        r = weight * P + (1 - weight) * q
        kl_p = sum(a * math.log(a / b) for a, b in zip(P, r) if a)
        kl_q = sum(a * math.log(a / b) for a, b in zip(q, r) if a)
        return math.exp(-5 * kl_q), math.exp(-5 * kl_p)

    def integrand(weight, h=1e-6):
        slope = (frontier(weight + h)[0] - frontier(weight - h)[0]) / (2 * h)
        return -frontier(weight)[1] * slope

    curve, _ = integrate.quad(integrand, 1e-5, 1 - 1e-5)
    left = frontier(1 - 1e-9)[0]
    assert frontier_area(P, q) == pytest.approx(curve + left, rel=3e-3)
    assert frontier_area(P, q) == pytest.approx(frontier_area(q, P), rel=3e-3)


def test_the_area_falls_as_one_distribution_moves_away():
    q = np.array([0.0, 0.1, 0.2, 0.7])
    areas = [frontier_area(P, (1 - t) * P + t * q) for t in np.linspace(0, 1, 11)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] - areas[-1] > 0.3


def test_sets_of_one_distribution_score_high_and_others_low():
    same = mauve(unit_vectors(1000, seed=1), unit_vectors(1000, seed=2))
    assert same > 0.9
    far = -unit_vectors(1000, seed=2)
    assert mauve(unit_vectors(1000, seed=1), far) < 0.02
    rows = unit_vectors(1000, seed=1)
    assert mauve(rows, rows) == pytest.approx(1, abs=1e-12)


def test_more_skew_scores_lower():
    even = np.full(6, 1 / 6)
    skewed = np.array([0.7, 0.1, 0.1, 0.05, 0.03, 0.02])
    scores = [
        mauve(
            unit_vectors(1000, seed=1),
            unit_vectors(1000, seed=2, weights=(1 - t) * even + t * skewed),
        )
        for t in (0, 0.5, 1)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[2] > 0.2


def test_the_seed_decides_and_sizes_must_be_equal():
    one, other = unit_vectors(300, seed=1), unit_vectors(300, seed=2)
    assert mauve(one, other, seed=3) == mauve(one, other, seed=3)
    assert mauve(one, other, seed=3) != mauve(one, other, seed=4)
    with pytest.raises(ValueError, match="equal size; found 300 and 299"):
        mauve(one, other[1:])
