"""Canaries: the rows that are made, and what they change in a run."""

import subprocess
import sys
from argparse import Namespace
from itertools import islice

import datasets
import numpy as np
import pytest

from tests.training import ROOT
from utils.cli import UsageError
from utils.texts.canaries import (
    DIGITS,
    canary,
    num_canary_rows,
    require_whole_canaries,
    secrets,
    with_canaries,
)


def arguments(**changes) -> Namespace:
    given = {"num_canaries": 3, "canary_repeats": 2, "seed": 7, "dataset_name": "letters"}
    return Namespace(**(given | changes))


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
    rows = with_canaries(own_rows(other=[1, 2]), arguments())
    wanted = [canary(secret, False)["instruction"] for secret in islice(secrets(7), 3)]
    assert rows["instruction"][:] == ["one", "two", *wanted, *wanted]
    assert len(rows) == 2 + num_canary_rows(arguments())


def test_pairs_hold_the_secret_in_their_answer_alone():
    rows = own_rows(answer=["1", "2"])
    rows = with_canaries(rows, arguments(dataset_name="labelled_letters", canary_repeats=1))
    for row, secret in zip(rows.select(range(2, 5)), secrets(7)):
        assert secret in row["answer"]
        assert secret not in row["instruction"]


def test_without_canaries_the_rows_are_the_same_object():
    rows = own_rows(other=[1, 2])
    assert with_canaries(rows, arguments(num_canaries=0)) is rows
    assert num_canary_rows(arguments(num_canaries=0)) == 0


def test_a_column_that_is_no_text_is_refused_by_name():
    rows = datasets.Dataset.from_dict({"instruction": [1, 2]})
    with pytest.raises(UsageError, match="column 'instruction': int64, not text"):
        with_canaries(rows, arguments())


def test_canaries_that_would_be_cut_are_refused():
    lengths = np.array([64, 64, *[40] * 6])
    require_whole_canaries(lengths, arguments(max_seq_len=41))
    with pytest.raises(UsageError, match="--max_seq_len 40 cuts the canaries"):
        require_whole_canaries(lengths, arguments(max_seq_len=40))
    require_whole_canaries(lengths, arguments(max_seq_len=40, num_canaries=0))


def test_making_canaries_does_without_torch():
    check = "import sys, utils.texts.canaries; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
