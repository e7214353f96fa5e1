"""Exposure against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from evaluation.measures.exposure import exposure_by_chance, exposures, secrets_found


def test_the_first_rank_gives_all_bits_and_the_last_none():
    candidates = np.arange(1.0, 128.0)
    found = exposures(np.array([0.0, 200.0, 1.5, 63.5]), candidates)
    assert found == pytest.approx([7, 0, 6, 1])


def test_ties_are_the_mean_over_all_ways_to_break_them():
    candidates = [1.0, 2.0, 2.0, 2.0, 3.0]
    ways = []
    for order in itertools.permutations(range(4)):  # the canary is 0, three candidates tie
        rank = 2 + order.index(0)
        ways.append(math.log2(6) - math.log2(rank))
    assert exposures(np.array([2.0]), np.array(candidates))[0] == pytest.approx(np.mean(ways))


def test_a_model_that_says_the_same_of_all_gives_what_chance_does():
    """A cut canary, say: were ties ranked first, it would look like a perfect leak."""
    assert exposures(np.zeros(3), np.zeros(500)) == pytest.approx(exposure_by_chance(500))


def test_chance_is_the_mean_over_all_ranks_and_nears_1_over_ln_2():
    candidates = np.arange(1.0, 301.0)
    every_rank = exposures(np.arange(0.5, 301.0), candidates)
    assert len(every_rank) == 301
    assert exposure_by_chance(300) == pytest.approx(every_rank.mean())
    assert exposure_by_chance(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)


def test_secrets_are_found_by_their_digits_in_a_row():
    texts = ["the code is 123456789.", "1234 56780", "99987654321"]
    secrets = ["123456789", "123456780", "987654321", "111111111"]
    assert secrets_found(texts, secrets).tolist() == [1, 0, 1, 0]
