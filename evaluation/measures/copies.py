"""Which texts are copies of rows, or nearly so: by words, their order and nothing else.

A letter of a script without spaces, such as Chinese, counts as a word.
"""

import re
from collections import Counter

import numpy as np

from evaluation.measures.overlap import keys

# Of two texts, twice the words of their longest common subsequence over the words of both.
NEAR = 0.8
# With fewer words, one other word is too large a part of a text.
LEAST_WORDS = 5
# Of each text, at most so many rows are looked up, and the most alike of them compared.
_LOOKED_UP, _COMPARED = 8192, 32
_ROWS_AT_ONCE = 20_000
# Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_WITHOUT_SPACES}]|[^ {_WITHOUT_SPACES}]+")


def near_copies(texts: list[str], rows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of which texts are copies, or near copies of at least `LEAST_WORDS` words.

    Rows that share pairs of words with a text, the rarest pairs first, are compared with it: of a
    row that is a near copy some pair stays, unless every other word was touched.

    Args:
        texts, rows: in their comparison form, none of them without a row; no row twice.

    Returns:
        int64 [pairs] each: the places of a text and of a row, for every pair that was found.
    """
    by_key = {key: place for place, key in enumerate(keys(rows).tolist())}
    equal = [by_key.get(key) for key in keys(texts).tolist()]
    pairs = [(text, row) for text, row in enumerate(equal) if row is not None]
    words = [_WORD.findall(text) for text in texts]
    index = _Index(words, rows)
    for place, own in enumerate(words):
        if len(own) >= LEAST_WORDS:
            common = _CommonWords(own)
            pairs += [
                (place, row)
                for row in index.most_alike(place, len(own))
                if row != equal[place] and common.share(_WORD.findall(rows[row])) >= NEAR
            ]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


class _Index:
    """The rows that hold each pair of words that some text has."""

    def __init__(self, texts: list[list[str]], rows: list[str]):
        vocabulary: dict[str, int] = {}
        own = [
            _pairs([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words])
            for words in texts
        ]
        # 0 is no pair: it makes room for texts of one word.
        self._known = np.unique(np.concatenate([*own, [0]]))
        pairs: list[np.ndarray] = []
        holders: list[np.ndarray] = []
        lengths: list[int] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = [_WORD.findall(row) for row in rows[start : start + _ROWS_AT_ONCE]]
            lengths += map(len, some)
            block = [_pairs([vocabulary.get(word, 0) for word in words]) for words in some]
            values = np.concatenate(block)
            places = np.repeat(np.arange(start, start + len(block)), list(map(len, block)))
            place = np.minimum(np.searchsorted(self._known, values), len(self._known) - 1)
            is_known = self._known[place] == values
            pairs.append(place[is_known])
            holders.append(places[is_known])
        found = np.concatenate(pairs)
        self._holders = np.concatenate(holders)[np.argsort(found, kind="stable")]
        counts = np.bincount(found, minlength=len(self._known))
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._texts, self._lengths = own, np.array(lengths)

    def most_alike(self, text: int, length: int) -> list[int]:
        """Of rows that are near in `length`, those that share the most of a text's rare pairs."""
        pairs = np.searchsorted(self._known, np.unique(self._texts[text]))
        counts = self._ends[pairs] - self._starts[pairs]
        order = np.argsort(counts, kind="stable")
        pairs, before = pairs[order], np.cumsum(counts[order]) - counts[order]
        rows = [
            self._holders[self._starts[pair] : self._ends[pair]][: _LOOKED_UP - used]
            for pair, used in zip(pairs.tolist(), before.tolist())
            if used < _LOOKED_UP
        ]
        found, shared = np.unique(np.concatenate(rows), return_counts=True)
        lengths = self._lengths[found]
        is_near = 2 * np.minimum(lengths, length) >= NEAR * (lengths + length)
        found, shared = found[is_near], shared[is_near]
        return found[np.argsort(-shared, kind="stable")[:_COMPARED]].tolist()


def _pairs(words: list[int]) -> np.ndarray:
    """int64 [pairs]: a number for every two words in a row; those with an unknown word left out."""
    numbers = np.array(words, dtype=np.int64)
    first, second = numbers[:-1], numbers[1:]
    return (first << 32 | second)[(first > 0) & (second > 0)]


class _CommonWords:
    """What rows have in common with one text, in its order (Hyyro 2004, "Bit-parallel LCS")."""

    def __init__(self, words: list[str]):
        self._length = len(words)
        self._places = Counter[str]()
        for place, word in enumerate(words):
            self._places[word] += 1 << place

    def share(self, row: list[str]) -> float:
        """Twice the words of the longest common subsequence, over the words of both."""
        missing = everything = (1 << self._length) - 1
        for word in row:
            common = missing & self._places[word]
            missing = (missing + common | missing - common) & everything
        return 2 * (self._length - missing.bit_count()) / (self._length + len(row))
