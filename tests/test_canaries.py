"""Canaries: the rows that are made, and what they change in a run."""

from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest

from utils.cli import UsageError
from utils.texts.canaries import DIGITS, Canaries, canary, secrets
from utils.texts.prompts import TOPIC, UNCONDITIONAL

CANARIES = Canaries(count=3, repeats=2, seed=7)
NONE = Canaries(count=0, repeats=1, seed=7)


def own_rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"instruction": ["one", "two"], **columns})


def test_secrets_follow_from_the_seed_alone_and_never_change():
    assert list(islice(secrets(0), 3)) == ["413145776", "273109486", "246241655"]
    assert list(islice(secrets(7), 5))[:3] == list(islice(secrets(7), 3))
    assert not set(islice(secrets(7), 100)) & set(islice(secrets(8), 100))


def test_secrets_are_distinct_and_evenly_spread():
    found = list(islice(secrets(3), 20_000))
    assert len(set(found)) == len(found)
    assert all(len(secret) == DIGITS and secret.isdigit() for secret in found)
    digits = np.array([list(map(int, secret)) for secret in found])
    shares = np.stack([np.bincount(column, minlength=10) for column in digits.T]) / len(found)
    # Six deviations of a share of 1/10; a digit that never leads would be 50 away.
    assert np.abs(shares - 0.1).max() < 6 * np.sqrt(0.09 / len(found))


def test_a_secret_that_comes_twice_is_passed_over(monkeypatch):
    monkeypatch.setattr("utils.texts.canaries.DIGITS", 1)
    assert sorted(islice(secrets(0), 10)) == [str(digit) for digit in range(10)]


def test_every_canary_is_added_after_the_own_rows_as_often_as_asked():
    rows = CANARIES.added_to(own_rows(other=[1, 2]), "letters", UNCONDITIONAL)
    wanted = [canary(secret, UNCONDITIONAL)["instruction"] for secret in islice(secrets(7), 3)]
    assert rows["instruction"][:] == ["one", "two", *wanted, *wanted]
    assert len(rows) == 2 + CANARIES.num_rows


def test_pairs_hold_the_secret_in_their_answer_alone():
    rows = own_rows(answer=["1", "2"])
    rows = replace(CANARIES, repeats=1).added_to(rows, "labelled_letters", "vicuna")
    for row, secret in zip(rows.select(range(2, 5)), secrets(7)):
        assert secret in row["answer"]
        assert secret not in row["instruction"]


def test_topics_are_shared_and_the_instruction_holds_the_secret():
    rows = Canaries(3, 1, 7).added_to(own_rows(topic=["a", "b"]), "letters", TOPIC)
    made = rows.select(range(2, 5))
    assert len(set(made["topic"])) == 1
    for row, secret in zip(made, secrets(7)):
        assert secret in row["instruction"]
        assert secret not in row["topic"]


def test_without_canaries_the_rows_are_the_same_object():
    rows = own_rows(other=[1, 2])
    assert NONE.added_to(rows, "letters", UNCONDITIONAL) is rows
    assert NONE.num_rows == 0


def test_a_column_that_is_no_text_is_refused_by_name():
    rows = datasets.Dataset.from_dict({"instruction": [1, 2]})
    with pytest.raises(UsageError, match="column 'instruction': int64, not text"):
        CANARIES.added_to(rows, "letters", UNCONDITIONAL)


def test_canaries_that_would_be_cut_are_refused():
    lengths = np.array([64, 64, *[40] * 6])
    CANARIES.require_whole(lengths, 41)
    with pytest.raises(UsageError, match="--max_seq_len 40 cuts the canaries"):
        CANARIES.require_whole(lengths, 40)
    NONE.require_whole(lengths, 40)
