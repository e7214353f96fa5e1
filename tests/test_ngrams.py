"""The model of runs of tokens: a distribution, which knows what it was fitted on."""

import math

import numpy as np
import pytest

from evaluation.measures.ngrams import NGrams

TEXTS = [[1, 2, 3, 1, 2, 4], [5, 1, 2, 3], [2]]


@pytest.mark.parametrize("context", [(), (1,), (1, 2), (5, 1, 2), (7, 7), (3, 1, 2, 4)])
def test_probabilities_of_all_tokens_sum_to_one(context):
    model = NGrams(TEXTS, 10)
    found = [model._probability(context, token) for token in range(10)]
    assert min(found) > 0
    assert sum(found) == pytest.approx(1)


def test_witten_and_bells_rule_by_hand():
    model = NGrams(TEXTS, 10)
    # Of 11 tokens, 5 kinds: 1 is there 3 times; after 1 (3 times) always 2.
    single = [(count + 5 / 10) / 16 for count in (3, 4)]
    assert model._probability((), 1) == pytest.approx(single[0])
    assert model._probability((1,), 2) == pytest.approx((3 + single[1]) / 4)
    expected = math.log((3 + single[1]) / 4) - math.log(single[1])
    assert model.gain([1, 2], 1) == pytest.approx(expected)
    assert model.gain([1, 2]) == pytest.approx(expected / 2)


def test_texts_that_it_was_fitted_on_gain_more_than_the_same_tokens_in_another_order():
    random = np.random.default_rng(0)
    texts = random.integers(0, 100, (50, 12)).tolist()
    model = NGrams(texts, 100)
    shuffled = [random.permutation(text).tolist() for text in texts]
    known, unknown = ([model.gain(text) for text in each] for each in (texts, shuffled))
    assert min(known) > max(unknown)
    assert model.gain([]) == 0
