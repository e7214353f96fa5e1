"""Copies and near copies, against comparing every text with every row."""

import numpy as np
import pytest

from evaluation.measures.copies import _CommonWords, near_copies


def random_words(count: int, seed: int, vocabulary: int = 300) -> list[list[str]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 30, size=count)
    return [[f"w{word}" for word in random.integers(vocabulary, size=n)] for n in lengths]


def edited(words: list[str], random: np.random.Generator) -> list[str]:
    """A word in ten left out, doubled or replaced, at least one."""
    words = list(words)
    for place in sorted(random.permutation(len(words))[: max(1, len(words) // 10)], reverse=True):
        words[place : place + 1] = [[], [words[place]] * 2, ["new"]][random.integers(3)]
    return words


def longest_common(one: list[str], other: list[str]) -> int:
    lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            longest = max(lengths[i, j + 1], lengths[i + 1, j])
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if left == right else longest
    return int(lengths[-1, -1])


@pytest.mark.parametrize("seed", range(20))
def test_common_words_are_those_of_the_longest_common_subsequence(seed):
    one, other = random_words(2, seed, vocabulary=4)
    share = 2 * longest_common(one, other) / (len(one) + len(other))
    assert _CommonWords(one).share(other) == share


def test_found_are_the_pairs_that_comparing_all_finds():
    random = np.random.default_rng(0)
    rows = random_words(90, seed=1)
    texts = [edited(row, random) for row in rows[:30]] + rows[30:40] + random_words(20, seed=2)
    expected = {
        (text, row)
        for text, words in enumerate(texts)
        for row, others in enumerate(rows)
        if 2 * longest_common(words, others) >= 0.8 * len(words + others)
        and (min(len(words), len(others)) >= 5 or words == others)
    }
    found = near_copies([" ".join(words) for words in texts], [" ".join(words) for words in rows])
    assert 37 < len(expected) <= 40
    assert set(zip(*(each.tolist() for each in found))) == expected


def test_short_texts_are_copies_when_they_are_equal():
    texts = ["hello", "hello there you", "hi", "say it once more now"]
    rows = ["hello", "hello there", "say it once more then"]
    text, row = near_copies(texts, rows)
    assert list(zip(text.tolist(), row.tolist())) == [(0, 0), (3, 2)]


def test_what_rows_have_in_common_with_one_another_hides_no_copy():
    """Ten thousand rows of one pattern, of which a text is one but for two words."""
    pattern = "please write for me a short and friendly text about the number {} of today"
    rows = [pattern.format(f"n{number}") for number in range(10_000)]
    text = pattern.format("n9876").replace("short", "long").replace("friendly", "kind")
    _, found = near_copies([text], rows)
    assert 9876 in found.tolist()


def test_a_script_without_spaces_is_compared_letter_by_letter():
    rows = [
        "\u8bf7\u7528\u4e2d\u6587\u89e3\u91ca\u8fd9\u4e2a\u95ee\u9898",
        "other words are here now",
    ]
    text, row = near_copies([rows[0][:-1] + "\u4e8b"], rows)
    assert (text.tolist(), row.tolist()) == ([0], [0])


def test_a_row_without_a_known_pair_and_a_long_text_are_no_matter():
    long = " ".join(f"w{number}" for number in range(5000))
    text, row = near_copies([f"{long} more", "a"], ["b", long])
    assert (text.tolist(), row.tolist()) == ([0], [1])
