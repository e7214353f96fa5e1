"""When two texts count as one, and the split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.texts.text_filters import comparison_form, split_rows


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 plus 2?", "  what IS\n2 plus 2 "),
        ("Name a river, please.", "name a river please"),
        ("STRASSE", "straße"),
    ],
)
def test_case_white_space_and_punctuation_do_not_tell_texts_apart(one, other):
    assert comparison_form(one) == comparison_form(other)


@pytest.mark.parametrize(
    ("one", "other"), [("Add 2 and 3", "Add 2 and 4"), ("a b", "ab"), ("größer", "großer")]
)
def test_words_do(one, other):
    assert comparison_form(one) != comparison_form(other)


@given(
    texts=st.lists(st.text(), unique=True, min_size=2, max_size=40),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(),
)
def test_a_split_is_a_partition_of_the_asked_sizes(texts, shares, seed):
    train_size = int(shares[0] * len(texts))
    val_size = int(shares[1] * (len(texts) - train_size))
    rows = [{"instruction": text} for text in texts]
    splits = split_rows(rows, train_size, val_size, seed)
    assert [len(splits["train"]), len(splits["val"])] == [train_size, val_size]
    together = [row["instruction"] for part in splits.values() for row in part]
    assert sorted(together) == sorted(texts)
    assert splits == split_rows(rows, train_size, val_size, seed)


def test_the_seed_decides_the_split_and_order_does_not_survive():
    rows = [{"instruction": str(n)} for n in range(1000)]
    one, other = (split_rows(rows, 500, 100, seed)["train"] for seed in (0, 1))
    shared = len({row["instruction"] for row in one} & {row["instruction"] for row in other})
    assert 200 < shared < 300  # 250 +- 8 for independent halves
    assert one != sorted(one, key=lambda row: int(row["instruction"]))
