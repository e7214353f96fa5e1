"""What texts share with training rows, and with as many rows that were never trained on.

Whole texts, runs of words, nearest neighbours. Words are those of `comparison_form`; a run
without spaces, as Chinese is written, counts as one.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Parts of the smaller set, and at most so many of the larger one: every part has a bit of 64.
PARTS, MOST_PARTS = 16, 48
# Similarities equal to so many decimals are ties, as those of one text in two batches are.
SIMILARITY_DECIMALS = 4


@dataclass(frozen=True)
class Reference:
    """Rows of the training and of the held-out set, in parts of one size.

    Attributes:
        texts: rows of both sets; those that filled no part are left out.
        parts: uint64 [rows], the bit of each row's part; the training set's come first.
        num_training, num_held_out: parts of each set.
        size: rows of a part.
    """

    texts: list[str]
    parts: np.ndarray
    num_training: int
    num_held_out: int
    size: int

    @property
    def is_training(self) -> np.ndarray:
        """bool [parts]."""
        return np.arange(self.num_training + self.num_held_out) < self.num_training

    @property
    def bits(self) -> np.ndarray:
        """uint64 [parts], in order."""
        return np.uint64(1) << np.arange(self.num_training + self.num_held_out, dtype=np.uint64)

    def shares(self, found_in: np.ndarray) -> np.ndarray:
        """The share of texts that were found in each part, float64 [parts].

        Args:
            found_in: uint64 [texts], the bits of the parts in which each was found.
        """
        return np.array([(found_in & bit > 0).mean() for bit in self.bits])


def make_reference(training: list[str], held_out: list[str], seed: int) -> Reference:
    """Shuffle both sets, and cut them into parts of one size: the smaller set into `PARTS`.

    A larger set holds more coincidences, so a part is what is compared; and parts of one set
    differ by chance, which tells how much both sets may.
    """
    random = np.random.default_rng(seed)
    size = -(-min(len(training), len(held_out)) // PARTS)
    num_training, num_held_out = (
        min(len(rows) // size, MOST_PARTS) for rows in (training, held_out)
    )
    texts = []
    for rows, count in ((training, num_training), (held_out, num_held_out)):
        texts += [rows[row] for row in random.permutation(len(rows))[: count * size]]
    bits = np.uint64(1) << np.arange(num_training + num_held_out, dtype=np.uint64)
    return Reference(texts, np.repeat(bits, size), num_training, num_held_out, size)


def keys(texts: list[str]) -> np.ndarray:
    """uint64 [texts]: equal for equal texts, and for others by a chance of 2^-64 a pair."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.uint64)


def exact_matches(text_keys: np.ndarray, row_keys: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """uint64 [texts]: the parts that hold a row of the same key.

    Args:
        text_keys, row_keys: see `keys`.
        parts: the rows', see `Reference`.
    """
    known, _, known_parts = _merged(row_keys, parts)
    found, place = _looked_up(text_keys, known)
    return np.where(found, known_parts[place], np.uint64(0))


def shared_runs(texts: list[str], rows: list[str], parts: np.ndarray) -> Iterator[np.ndarray]:
    """Find the runs of words that texts share with rows: of one word, of two, and so on.

    A run is known by a number, that of the run without its last word and that word's; so equal
    numbers are equal runs (Karp, Miller and Rosenberg 1972, "Rapid Identification of Repeated
    Patterns in Strings, Trees and Arrays"). Only runs that were found grow by a word.

    Args:
        texts, rows: in their comparison form, words between single spaces.
        parts: the rows', see `Reference`.

    Yields:
        uint64 [texts]: the parts in which a run of each text is; until no text has any.
    """
    vocabulary: dict[str, int] = {}
    row_words, row_of_word = _numbered(rows, vocabulary, grow=True)
    words, text_of_word = _numbered(texts, vocabulary, grow=False)
    # Runs by the places of their last words.
    row_ends, ends = np.flatnonzero(row_words >= 0), np.flatnonzero(words >= 0)
    row_parts = parts[row_of_word[row_ends]]
    row_runs, runs = row_words[row_ends].astype(np.int64), words[ends].astype(np.int64)
    while len(row_runs) and len(runs):
        known, run_of_row, known_parts = _merged(row_runs, row_parts)
        found, run = _looked_up(runs, known)
        ends, run = ends[found], run[found]
        found_in = np.zeros(len(texts), dtype=np.uint64)
        numbers, starts = np.unique(text_of_word[ends], return_index=True)
        if len(numbers):
            found_in[numbers] = np.bitwise_or.reduceat(known_parts[run], starts)
            yield found_in
        is_shared = np.zeros(len(known), dtype=bool)
        is_shared[run] = True
        row_goes_on = is_shared[run_of_row] & (row_words[row_ends + 1] >= 0)
        row_ends, row_parts = row_ends[row_goes_on] + 1, row_parts[row_goes_on]
        row_runs = run_of_row[row_goes_on] * len(vocabulary) + row_words[row_ends]
        goes_on = words[ends + 1] >= 0
        ends = ends[goes_on] + 1
        runs = run[goes_on] * len(vocabulary) + words[ends]


def _numbered(
    texts: list[str], vocabulary: dict[str, int], *, grow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Every word's number, with -1 for unknown ones and after each text; and every word's text."""
    numbers, lengths = array("i"), np.empty(len(texts), dtype=np.int64)
    for place, text in enumerate(texts):
        words = text.split()
        if grow:
            numbers.extend([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        else:
            numbers.extend([vocabulary.get(word, -1) for word in words])
        numbers.append(-1)
        lengths[place] = len(words) + 1
    places = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    return np.frombuffer(numbers, dtype=np.int32), places


def _merged(values: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct values in order, the place of each value among them, and all parts of each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))
    return ordered[starts], place, np.bitwise_or.reduceat(parts[order], starts)


def _looked_up(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value is among `known` (in order, not empty), and where it is or would be."""
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[place] == values, place


def nearest(
    vectors: np.ndarray, row_vectors: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of each text: cosine similarities (float64) and places, [texts, count].

    Args:
        vectors, row_vectors: float16 unit vectors [texts, dimensions] and [rows, dimensions].
        count: rows wanted, the nearest first; all of them where there are fewer.
    """
    import faiss

    index = faiss.IndexFlatIP(row_vectors.shape[1])
    index.add(row_vectors.astype(np.float32))
    found, places = index.search(vectors.astype(np.float32), min(count, len(row_vectors)))
    return np.round(found.astype(np.float64), SIMILARITY_DECIMALS), places
