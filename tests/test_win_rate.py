"""Judgements to win rates, with and without the length of answers."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit

from evaluation.measures.intervals import bootstrap
from evaluation.measures.win_rate import (
    RIDGE,
    contradictions,
    length_controlled,
    length_feature,
    preferences,
    read_verdict,
)


def controlled(feature, preference):
    return length_controlled(np.array(feature, float), np.array(preference, float))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0), ("B", 0.0), ("tie", 0.5), ("Tie\n", 0.5), (" b \r\n\n", 0.0),
        ("B is longer.\nStill:\nA", 1.0),
        ("A is better", 1.0), ("The verdict: A", 1.0), ("A.", 1.0), ("**A**", 1.0),
        ("A or B", None), ("A\nbecause it is right", None), ("C", None), ("AB", None), ("", None),
        ("[[A]]", 1.0), ("\u0410", None), ("neither", None),
        ("_b_", 0.0), ("`tie`", 0.5), ("Final answer: **B**", 0.0), ("It is a tie.", 0.5),
        ("My verdict is B", 0.0), ("The better answer is **B**.", 0.0), ("I prefer answer B", 0.0),
        ("Answer A is better than answer B.", 1.0), ("A is longer, but B is better.", 0.0),
        ("Answer B serves the person better.", 0.0), ("B wins.", 0.0),
        ("A is no better than B", None), ("A is not better", None), ("A clear win", None),
        ("A is better, and B is the best.", None), ("Neither A nor B is better", None),
        ("A is longer than B", None), ("I'd say a", None),
    ],
)  # fmt: skip
def test_a_verdict_is_a_word_or_a_clear_sentence_on_the_last_line(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_win_needs_both_orders_and_a_contradiction_prefers_one_position():
    # How both orders judge, each 1 where what stands first is preferred: preference, contradiction.
    table = {
        (1, 0): (1, 0), (0, 1): (0, 0), (0.5, 0.5): (0.5, 0),
        (1, 1): (0.5, 1), (0, 0): (0.5, 1),
        (1, 0.5): (0.5, 0), (0.5, 0): (0.5, 0), (0, 0.5): (0.5, 0), (0.5, 1): (0.5, 0),
    }  # fmt: skip
    orders = np.array(list(table), float).T
    assert list(zip(preferences(*orders), contradictions(*orders))) == list(table.values())


def test_the_feature_is_the_published_one_and_zero_at_equal_lengths():
    ours, theirs = np.array([30.0, 10.0, 50.0, 20.0]), np.array([10.0, 10.0, 20.0, 30.0])
    difference = np.array([20, 0, 30, -10])
    deviation = np.sqrt(np.mean((difference - 10) ** 2))
    assert length_feature(ours, theirs) == pytest.approx(np.tanh(difference / deviation))
    assert length_feature(ours, theirs)[1] == 0


@pytest.mark.parametrize("difference", [[0, 0, 0], [7, 7, 7], [3, 50, 1], [-3, -5, 0]])
def test_there_is_no_feature_where_equal_lengths_lie_outside_of_the_data(difference):
    lengths = np.array([30.0, 90.0, 40.0])
    assert length_feature(lengths + difference, lengths) is None


def test_two_lengths_have_a_closed_form():
    """Wins of 9 in 10 where longer and of 4 in 10 where shorter: the middle of both logits."""
    feature = np.repeat([0.7, -0.7], 10_000)
    preference = np.repeat([1, 0, 1, 0], [9_000, 1_000, 4_000, 6_000])
    expected = expit((logit(0.9) + logit(0.4)) / 2)
    assert controlled(feature, preference) == pytest.approx(expected, abs=1e-4)
    # Ties are halves: they count as a win and a loss of half the weight.
    halves = np.repeat([1, 0.5, 1, 0.5, 0], [8_000, 2_000, 2_000, 4_000, 4_000])
    assert controlled(feature, halves) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("quality", "length"), [(0, 5), (0.8, 5), (-1, 3), (1.5, 0)])
def test_the_effect_of_quality_is_found_beside_that_of_length(quality, length):
    difference = np.random.default_rng(0).normal(150, 100, 2_000)
    feature = length_feature(difference, np.zeros(2_000))
    preference = expit(quality + length * feature)
    assert controlled(feature, preference) == pytest.approx(expit(quality), abs=2e-3)
    # Without control it would be another figure, unless length has no effect.
    assert (abs(preference.mean() - expit(quality)) > 0.1) == (length > 0)


def test_where_length_alone_decides_the_raw_rate_is_high_and_the_controlled_one_is_not():
    random = np.random.default_rng(1)
    difference = random.normal(150, 100, 500)
    feature = length_feature(difference, np.zeros(500))
    preference = (random.random(500) < expit(6 * feature)).astype(float)
    low, high = bootstrap(feature, preference, statistic=length_controlled)
    assert preference.mean() > 0.9
    assert low < 0.5 < high
    assert 0.2 < high - low < 0.4
    assert controlled(feature, preference) == pytest.approx(0.5, abs=0.1)
    # Without an overlap it is the middle of the gap that decides; here that is at equal lengths.
    difference = np.arange(-19.5, 300)
    feature, longer = length_feature(difference, 0 * difference), difference > 0
    assert longer.mean() > 0.9
    assert controlled(feature, longer) == pytest.approx(0.5, abs=0.05)


def test_the_ridge_keeps_a_rate_of_wins_alone_finite():
    """The optimum of the constant alone, since the feature is balanced: n (1 - p) = ridge a."""
    feature = np.tile([0.5, -0.5], 50)
    constant = brentq(lambda a: 100 * (1 - expit(a)) - RIDGE * a, 0, 50)
    assert controlled(feature, np.ones(100)) == pytest.approx(expit(constant), abs=1e-7)
    assert 1 - controlled(feature, np.ones(100)) == pytest.approx(1 - expit(constant), rel=1e-3)
    assert controlled(feature, np.zeros(100)) == pytest.approx(1 - expit(constant), rel=1e-3)
