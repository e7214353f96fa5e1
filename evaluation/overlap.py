"""What texts share with training rows, and with as many rows that were never trained on.

Whole texts, runs of words, nearest neighbours: each is found in equally large parts of both sets
at once, since a larger set holds more coincidences. Words are those of `comparison_form`; a run
without spaces, as Chinese is written, counts as one.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Every part has a bit of 64, and the smaller one of the two sets is a single part.
MOST_PARTS = 63
# Similarities equal to so many decimals are ties, as those of one text in two batches are.
SIMILARITY_DECIMALS = 4


@dataclass(frozen=True)
class Reference:
    """Rows of the training and of the held-out set, in parts of one size.

    Attributes:
        texts: rows of both sets; those that filled no part are left out.
        parts: uint64 [rows], the bit of each row's part.
        training, held_out: the bits of each set's parts.
        size: rows of a part.
    """

    texts: list[str]
    parts: np.ndarray
    training: np.uint64
    held_out: np.uint64
    size: int

    def shares(self, found_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each set, the share of its parts that is among `found_in` (uint64 bits).

        The mean over parts of "found in this part": every row of the larger set is used, and both
        sets are still compared at one size.
        """
        training, held_out = (
            np.bitwise_count(found_in & bits) / np.bitwise_count(bits)
            for bits in (self.training, self.held_out)
        )
        return training, held_out


def make_reference(training: list[str], held_out: list[str], seed: int) -> Reference:
    """Shuffle both sets, and cut each into parts as large as the smaller set."""
    random = np.random.default_rng(seed)
    size = min(len(training), len(held_out))
    texts, parts, sides = [], [], []
    first = 0
    for rows in (training, held_out):
        count = min(len(rows) // size, MOST_PARTS)
        chosen = random.permutation(len(rows))[: count * size]
        texts += [rows[row] for row in chosen]
        bits = np.uint64(1) << np.arange(first, first + count, dtype=np.uint64)
        parts.append(np.repeat(bits, size))
        sides.append(np.bitwise_or.reduce(bits))
        first += count
    return Reference(texts, np.concatenate(parts), *sides, size)


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


def nearest(vectors: np.ndarray, row_vectors: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """float64 [texts, parts]: the cosine similarity of each text to its nearest row of each part.

    Args:
        vectors, row_vectors: float16 unit vectors [texts, dimensions] and [rows, dimensions].
        parts: the rows', see `Reference`; the columns are in order of their bits.
    """
    import faiss

    similarities = []
    for bit in np.unique(parts):
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(row_vectors[parts == bit].astype(np.float32))
        similarities.append(index.search(vectors.astype(np.float32), 1)[0][:, 0])
    return np.round(np.stack(similarities, axis=1).astype(np.float64), SIMILARITY_DECIMALS)
