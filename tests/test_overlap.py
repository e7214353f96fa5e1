"""What texts share with rows, against brute force."""

import numpy as np
import pytest

from evaluation.measures.overlap import (
    MOST_PARTS,
    PARTS,
    exact_matches,
    keys,
    make_reference,
    nearest,
    shared_runs,
)
from tests.resampling import unit_vectors


def bits(*parts) -> int:
    return sum(1 << part for part in parts)


def random_texts(count: int, seed: int, vocabulary: int = 4, longest: int = 9) -> list[str]:
    """Texts of 0 to `longest` words of a small vocabulary, so that they share runs by chance."""
    random = np.random.default_rng(seed)
    return [
        " ".join("abcdefgh"[word] for word in random.integers(vocabulary, size=length))
        for length in random.integers(longest + 1, size=count)
    ]


def runs_of(text: str, length: int) -> set[tuple]:
    words = text.split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


# ---------------------------------------------------------------- equal sizes


@pytest.mark.parametrize("swapped", [False, True])
def test_both_sets_are_compared_in_parts_of_one_size(swapped):
    larger, smaller = [f"large {n}" for n in range(70)], [f"small {n}" for n in range(40)]
    sets = (smaller, larger) if swapped else (larger, smaller)
    reference = make_reference(*sets, seed=0)
    assert reference.size == 3  # a sixteenth of the smaller set, rounded up
    numbers = [len(rows) // 3 for rows in sets]
    assert [reference.num_training, reference.num_held_out] == numbers
    assert [(reference.parts == bit).sum() for bit in reference.bits] == [3] * sum(numbers)
    is_training = np.isin(reference.parts, reference.bits[reference.is_training])
    for rows, chosen in zip(sets, (is_training, ~is_training)):
        own = [text for text, is_own in zip(reference.texts, chosen) if is_own]
        assert len(own) == len(set(own)) == len(rows) // 3 * 3
        assert set(own) <= set(rows)
        assert own != sorted(own, key=rows.index)  # drawn at random


def test_a_share_is_that_of_the_texts_by_part():
    reference = make_reference(list("abcd"), list("xy"), seed=0)
    found_in = np.array([bits(0, 2), bits(4), bits(0, 1, 2, 3, 4), 0], dtype=np.uint64)
    assert reference.shares(found_in).tolist() == [0.5, 0.25, 0.5, 0.25, 0.5, 0]


def test_many_parts_fit_in_the_bits():
    reference = make_reference([f"{n}" for n in range(1000)], ["x"] * 16, seed=0)
    assert (reference.num_training, reference.num_held_out) == (MOST_PARTS, PARTS)
    everywhere = exact_matches(keys(["x"]), keys(["x"] * 64), reference.parts)
    assert reference.shares(everywhere).tolist() == [1] * 64


# ---------------------------------------------------------------- copies and runs


def test_exact_matches_are_those_of_equal_texts():
    rows, parts = ["a", "b", "a", "c"], np.array([1, 2, 4, 8], dtype=np.uint64)
    found = exact_matches(keys(["a", "A", "c", "", "d", "a"]), keys(rows), parts)
    assert found.tolist() == [bits(0, 2), 0, bits(3), 0, 0, bits(0, 2)]


@pytest.mark.parametrize("seed", range(6))
def test_shared_runs_are_those_of_brute_force(seed):
    texts, rows = random_texts(40, seed), random_texts(30, seed + 100)
    random = np.random.default_rng(seed)
    parts = np.uint64(1) << random.integers(5, size=len(rows)).astype(np.uint64)
    found = list(shared_runs(texts, rows, parts))
    assert len(found) >= 4
    for length, found_in in enumerate([*found, np.zeros(len(texts), np.uint64)], start=1):
        for text, mask in zip(texts, found_in):
            expected = {
                int(part)
                for row, part in zip(rows, parts)
                if runs_of(text, length) & runs_of(row, length)
            }
            assert int(mask) == sum(expected), (length, text)


def test_runs_end_with_their_text_and_their_row():
    parts = np.array([1, 2], dtype=np.uint64)
    found = list(shared_runs(["a b", "c", "b c"], ["x a", "b c"], parts))
    assert [masks.tolist() for masks in found] == [[bits(0, 1), bits(1), bits(1)], [0, 0, bits(1)]]


def test_a_long_copy_is_found_whole_and_nothing_shared_gives_nothing():
    row = " ".join(f"word{n % 70}" for n in range(400))
    part = np.array([1], dtype=np.uint64)
    assert len(list(shared_runs([f"so {row} then", "no"], [row], part))) == 400
    assert list(shared_runs(["a b"], ["c d"], part)) == []
    assert list(shared_runs(["a b"], [""], part)) == []


# ---------------------------------------------------------------- nearest neighbours


def test_nearest_rows_are_those_of_all_products():
    vectors, rows = unit_vectors(50, seed=1), unit_vectors(90, seed=2)
    products = vectors.astype(np.float64) @ rows.astype(np.float64).T
    similarities, places = nearest(vectors, rows, 5)
    assert np.abs(similarities - np.sort(products, axis=1)[:, :-6:-1]).max() < 1e-4
    assert np.abs(np.take_along_axis(products, places, axis=1) - similarities).max() < 1e-4


def test_few_rows_are_all_near_and_the_same_row_twice_is_a_tie():
    rows = unit_vectors(1, seed=3)
    similarities, places = nearest(unit_vectors(50, seed=4), np.concatenate([rows, rows]), 5)
    assert similarities.shape == places.shape == (50, 2)
    assert np.array_equal(similarities[:, 0], similarities[:, 1])
