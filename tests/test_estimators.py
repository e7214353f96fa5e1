"""Lower bounds on epsilon, against closed forms, exhaustive probabilities and simulations."""

import numpy as np
import pytest
from scipy import optimize, stats

from privacy_checks.estimators import (
    correct_guesses,
    gaussian_pair,
    gdp,
    gdp_epsilon,
    one_run,
    one_run_f_dp,
)
from utils.privacy.accounting import SampledGaussian, compute_epsilon

DELTA, CONFIDENCE = 1e-5, 0.999
CANARIES, GUESSES = 4000, 800
THRESHOLDS = np.linspace(-0.5, 1.5, 9)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def draw(random, mu, canaries=CANARIES):
    """Scores of a mu-GDP mechanism: in at 1, out at 0, deviation 1/mu."""
    inside = random.binomial(canaries, 0.5)
    return random.normal(1, 1 / mu, inside), random.normal(0, 1 / mu, canaries - inside)


def bounds(inside, outside):
    correct = correct_guesses(inside, outside, GUESSES // 2, GUESSES // 2)
    return {
        "pair": gaussian_pair(inside, outside, DELTA, CONFIDENCE),
        "gdp": gdp(inside, outside, THRESHOLDS, DELTA, CONFIDENCE),
        "one run": one_run(correct, GUESSES, CANARIES, DELTA, CONFIDENCE),
        "one run f-DP": one_run_f_dp(correct, GUESSES, CANARIES, DELTA, CONFIDENCE),
    }


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
def test_the_epsilon_of_gdp_agrees_with_the_accountant(sigma, delta):
    accounted = compute_epsilon([SampledGaussian(1.0, sigma, 1)], delta).upper
    assert gdp_epsilon(1 / sigma, delta) == pytest.approx(accounted, abs=1e-6)


def test_the_epsilon_of_gdp_is_finite_for_any_mu():
    assert gdp_epsilon(-1.0, DELTA) == gdp_epsilon(0.0, DELTA) == 0.0
    assert gdp_epsilon(1e6, DELTA) == pytest.approx(1e12 / 2, rel=1e-4)


# Means over 30 simulations: a bound that is looser or tighter than it should be shows here.
@pytest.mark.parametrize(
    ("mu", "expected"),
    [
        (1.0, {"pair": 3.87, "gdp": 3.40, "one run": 1.36, "one run f-DP": 1.81}),
        (2.0, {"pair": 9.28, "gdp": 8.47, "one run": 2.31, "one run f-DP": 4.37}),
    ],
)
def test_bounds_have_their_usual_size(random, mu, expected):
    found = [bounds(*draw(random, mu)) for _ in range(6)]
    for name, value in expected.items():
        assert np.mean([bound[name] for bound in found]) == pytest.approx(value, abs=0.3), name


@pytest.mark.parametrize("mu", [1.0, 4.0])
def test_bounds_hold_as_often_as_they_say(random, mu):
    # At confidence 0.9 one in ten may exceed the truth, and the pair, whose model is exact, does.
    truth, above = gdp_epsilon(mu, DELTA), {"pair": 0, "gdp": 0}
    for _ in range(1000):
        scores = draw(random, mu, 400)
        above["pair"] += gaussian_pair(*scores, DELTA, 0.9) > truth
        above["gdp"] += gdp(*scores, THRESHOLDS, DELTA, 0.9) > truth
    assert 0.06 <= above["pair"] / 1000 <= 0.145
    assert above["gdp"] / 1000 <= 0.145


@pytest.mark.parametrize(("false_positives", "false_negatives"), [(3, 5), (0, 0), (0, 40)])
def test_one_threshold_gives_exact_bounds_on_both_error_rates(false_positives, false_negatives):
    outside = np.repeat([1.0, 0.0], [false_positives, 50 - false_positives])
    inside = np.repeat([0.0, 1.0], [false_negatives, 40 - false_negatives])
    rates = [
        # The rate at which so few errors have probability 0.025 (Clopper and Pearson 1934).
        optimize.brentq(lambda p, k=k, n=n: stats.binom.cdf(k, n, p) - 0.025, 1e-9, 1 - 1e-9)
        if k < n
        else 1.0
        for k, n in ((false_positives, 50), (false_negatives, 40))
    ]
    expected = gdp_epsilon(-stats.norm.ppf(rates).sum(), DELTA)
    found = gdp(inside, outside, np.array([0.5]), DELTA, 0.95)
    assert found == pytest.approx(expected, abs=1e-6)


def test_nothing_is_found_where_nothing_leaks(random):
    scores = random.normal(size=CANARIES)
    found = bounds(scores[:2000], scores[2000:])
    assert max(found.values()) < 0.2


def test_guesses_are_the_extremes():
    inside, outside = np.array([5.0, 4.0, 0.0]), np.array([1.0, 2.0, 4.5])
    assert correct_guesses(inside, outside, 1, 1) == 1  # 5 is in, 0 is not out
    assert correct_guesses(inside, outside, 2, 2) == 2  # 5 and 1 right, 4.5 and 0 wrong
    assert correct_guesses(inside, outside, 3, 0) == 2  # 5 and 4 right, 4.5 wrong
    assert correct_guesses(inside, outside, 0, 3) == 2  # 1 and 2 right, 0 wrong


def test_without_delta_one_run_is_the_binomial_bound():
    # Randomised response: the number of right guesses is Binomial(r, e^eps / (1 + e^eps)).
    guesses, correct = 1000, 800
    epsilon = one_run(correct, guesses, guesses, 0.0, CONFIDENCE)
    rate = 1 / (1 + np.exp(-epsilon))
    assert stats.binom.sf(correct - 1, guesses, rate) == pytest.approx(1 - CONFIDENCE, rel=1e-3)


@pytest.mark.parametrize("estimate", [one_run, one_run_f_dp])
def test_no_right_guess_refutes_nothing(estimate):
    assert estimate(0, 2, 8, 1e-5, 0.99) == 0


def test_one_run_gives_nothing_at_a_large_delta():
    assert one_run(390, 400, 4000, 0.01, CONFIDENCE) == 0.0


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_the_f_dp_bound_is_sound_and_tight_for_one_canary(mu):
    # One canary guessed right with probability Phi(mu / 2), the most that mu-GDP allows. At a
    # smaller alpha that mu is not refuted, at a larger one (just) it is.
    most = stats.norm.cdf(mu / 2)
    assert one_run_f_dp(1, 1, 1, DELTA, 1 - most * 0.999) <= gdp_epsilon(mu, DELTA)
    assert one_run_f_dp(1, 1, 1, DELTA, 1 - most * 1.01) > gdp_epsilon(mu, DELTA) * 0.9


@pytest.mark.parametrize("mu", [0.5, 1.5])
@pytest.mark.parametrize("correct", [3, 4, 5])
def test_the_f_dp_bound_holds_for_independent_canaries(mu, correct):
    # Every guess is right independently with probability Phi(mu / 2): exactly this tail.
    tail = stats.binom.sf(correct - 1, 5, stats.norm.cdf(mu / 2))
    assert one_run_f_dp(correct, 5, 5, DELTA, 1 - tail) <= gdp_epsilon(mu, DELTA) + 1e-6
