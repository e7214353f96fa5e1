"""Figures of the words of texts: lengths, vocabulary, diversity, repetitions.

Words are what `comparison_form` leaves: runs of letters, digits and underscores in lower case. A
run without spaces, as Chinese is written, counts as one.
"""

from collections import Counter

import numpy as np
from scipy.spatial.distance import jensenshannon

from utils.texts.text_filters import comparison_form

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text in their order."""
    return comparison_form(text).split()


def lengths_and_vocabulary(texts: list[str]) -> tuple[list[int], int]:
    """Words of each text, and how many different words all of them have."""
    lengths, vocabulary = [], set()
    for text in texts:
        found = words(text)
        lengths.append(len(found))
        vocabulary.update(found)
    return lengths, len(vocabulary)


def length_figures(lengths: list[int]) -> dict[str, float]:
    """Median, mean, and the percentiles between which nine texts of ten lie.

    Args:
        lengths: words of each text.
    """
    low, median, high = np.percentile(lengths, [5, 50, 95])
    return {
        "words of a text, median": float(median),
        "words of a text, mean": float(np.mean(lengths)),
        "words of a text, 5th percentile": float(low),
        "words of a text, 95th percentile": float(high),
    }


def length_line(lengths: list[int]) -> list[list[float]]:
    """Points [words, share of the texts at most as long], up to the 99th percentile."""
    values, counts = np.unique(lengths, return_counts=True)
    shares = np.cumsum(counts) / len(lengths)
    shown = values <= np.percentile(lengths, 99)
    return [[float(x), float(y)] for x, y in zip(values[shown], shares[shown])]


def duplicate_share(texts: list[str]) -> float:
    """The share of texts that repeat an earlier one, character for character."""
    return 1 - len(set(texts)) / len(texts)


def ngrams(texts: list[list[str]], n: int) -> list[Gram]:
    """Every n words in a row, within a text.

    Args:
        texts: the words of each.
    """
    return [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]


def equally_many_ngrams(sets: dict[str, list[list[str]]], n: int) -> dict[str, list[Gram]]:
    """The first n-grams of each set, as many as the set that has the fewest.

    What is counted of them, such as `distinct_share`, depends on their number.
    """
    grams = {name: ngrams(texts, n) for name, texts in sets.items()}
    fewest = min(map(len, grams.values()))
    return {name: found[:fewest] for name, found in grams.items()}


def distinct_share(grams: list[Gram]) -> float:
    """Distinct-n: different n-grams over all of them (Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models", section 5.2).
    """
    return len(set(grams)) / len(grams)


def shared_vocabulary(grams: list[Gram], reference: list[Gram]) -> float:
    """The share of `grams`, repeated ones included, that occur in `reference` at all."""
    known = set(reference)
    return sum(gram in known for gram in grams) / len(grams)


def jensen_shannon_distance(one: list[Gram], other: list[Gram]) -> float:
    """How differently two sets use words: 0 for equal frequencies, 1 if they share no word.

    The square root of the Jensen-Shannon divergence in bits (Lin 1991; a metric by Endres and
    Schindelin 2003). Two samples of one source are above 0, the less the more words they have.
    """
    counts = Counter(one), Counter(other)
    p, q = ([count[gram] for gram in counts[0] | counts[1]] for count in counts)
    return float(jensenshannon(p, q, base=2))
