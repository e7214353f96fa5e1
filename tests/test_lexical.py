"""Lengths, vocabulary, diversity and repetition of texts, by hand."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from evaluation.measures import lexical


def grams(text, n=1):
    return lexical.ngrams([lexical.words(text)], n)


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert lexical.words("Größe: 42 KM/h,\n don't!  STRASSE straße") == [
        "grösse", "42", "km", "h", "don", "t", "strasse", "strasse",
    ]  # fmt: skip
    assert lexical.words(" ?!\u2028 ") == []


def test_lengths_and_vocabulary():
    texts = ["a b c", "A b", "d", "d e f g"]
    lengths, vocabulary = lexical.lengths_and_vocabulary(texts)
    assert (lengths, vocabulary) == ([3, 2, 1, 4], 7)
    figures = lexical.length_figures(list(range(101)) + [1000])
    assert list(figures.values()) == pytest.approx([50.5, 59.314, 5.05, 95.95], abs=1e-3)


def test_the_line_of_lengths_is_their_distribution_without_the_longest():
    lengths = [1] * 50 + [3] * 25 + [7] * 75 + [10_000]
    assert lexical.length_line(lengths) == [[1, 50 / 151], [3, 75 / 151], [7, 150 / 151]]


def test_duplicates_repeat_an_earlier_text_exactly():
    assert lexical.duplicate_share(["a", "b", "a", "A", "a"]) == pytest.approx(2 / 5)
    assert lexical.duplicate_share(["a", "b"]) == 0


def test_ngrams_stay_within_a_text():
    texts = [["a", "b", "c"], ["d"], ["e", "f"]]
    assert lexical.ngrams(texts, 2) == [("a", "b"), ("b", "c"), ("e", "f")]
    assert lexical.ngrams(texts, 3) == [("a", "b", "c")]
    assert len(lexical.ngrams(texts, 1)) == 6


def test_distinct_n_is_compared_at_equal_numbers():
    sets = {"long": [["a", "b"] * 10], "short": [["a", "b", "a"], ["c"]]}
    for n, (count, long, short) in {1: (4, 2 / 4, 3 / 4), 2: (2, 2 / 2, 2 / 2)}.items():
        found = lexical.equally_many_ngrams(sets, n)
        assert {len(of_set) for of_set in found.values()} == {count}
        assert lexical.distinct_share(found["long"]) == long
        assert lexical.distinct_share(found["short"]) == short
    # At their own numbers the longer set of two seems poorer, whatever it says.
    assert lexical.distinct_share(lexical.ngrams(sets["long"], 1)) == 2 / 20


def test_the_shared_vocabulary_counts_every_occurrence():
    assert lexical.shared_vocabulary(grams("a a a x"), grams("a b b b")) == 3 / 4
    assert lexical.shared_vocabulary(grams("a b b b"), grams("a a a x")) == 1 / 4


def test_the_jensen_shannon_distance_is_that_of_word_frequencies():
    one, other = "a a a b c", "a b b d"
    p, q = np.array([3 / 5, 1 / 5, 1 / 5, 0]), np.array([1 / 4, 2 / 4, 0, 1 / 4])
    # The entropy of the mixture less the mean of both.
    divergence = entropy((p + q) / 2, base=2) - (entropy(p, base=2) + entropy(q, base=2)) / 2
    expected = math.sqrt(divergence)
    found = lexical.jensen_shannon_distance(grams(one), grams(other))
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == pytest.approx(lexical.jensen_shannon_distance(grams(other), grams(one)))
    assert lexical.jensen_shannon_distance(grams("a b"), grams("c d")) == 1
    assert lexical.jensen_shannon_distance(grams("a b b"), grams("b a b") * 3) == 0
    # Half of each is shared: half a bit.
    half = lexical.jensen_shannon_distance(grams("a b"), grams("a c"))
    assert half == pytest.approx(math.sqrt(0.5))


def test_samples_of_one_source_come_nearer_with_their_size():
    random = np.random.default_rng(0)
    words = [(str(number),) for number in range(100)]

    def distance(size):
        draws = (random.integers(100, size=size) for _ in range(2))
        return lexical.jensen_shannon_distance(*([words[i] for i in draw] for draw in draws))

    assert distance(100) > 2 * distance(1000) > 4 * distance(10_000) > 0
