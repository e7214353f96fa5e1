"""Token ids of a split: flat, on disk, the same in whatever parts, and collated."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest

import utils.texts.tokens
from privacy_checks.tiny_model import byte_tokenizer
from utils.cli import UsageError
from utils.texts.tokens import open_tokens, tokenise, tokenised

ROWS = [{"instruction": f"say {n}", "answer": str(n)} for n in range(7)]


def tokens(rows, folder, style="uncond_generation", max_seq_len=64):
    """The rows as `train.py` sees them."""
    tokenise(rows, byte_tokenizer(), style, max_seq_len, folder)
    return open_tokens(folder)


def test_tokens_lie_flat_and_come_back_padded_on_the_right(tmp_path):
    data = tokens(ROWS, tmp_path)
    assert len(data) == 7
    batch = data.collate(np.array([3, 0]), pad_id=0)
    assert batch["input_ids"].shape == (2, 7)  # <s> s a y _ 3 </s>
    assert batch["lengths"].tolist() == [7, 7]
    assert batch["loss_starts"].tolist() == [1, 1]
    mixed = tokens([{"instruction": "a"}, {"instruction": "abcd"}], tmp_path)
    mixed = mixed.collate(np.array([0, 1]), pad_id=0)
    assert mixed["input_ids"].tolist() == [[1, 67, 2, 0, 0, 0], [1, 67, 68, 69, 70, 2]]


def test_rows_tokenised_in_parts_are_those_tokenised_at_once(tmp_path, monkeypatch):
    whole = tokens(ROWS, tmp_path / "whole")
    monkeypatch.setattr(utils.texts.tokens, "ROWS_AT_ONCE", 2)
    parts = tokens(ROWS, tmp_path / "parts")
    assert parts.fingerprint() == whole.fingerprint()
    in_memory = tokenised(ROWS, byte_tokenizer(), "uncond_generation", 64)
    assert in_memory.fingerprint() == whole.fingerprint()
    assert parts.lengths.tolist() == [7] * 7


def test_token_ids_stay_on_disk_and_outlive_their_file(tmp_path):
    data = tokens(ROWS, tmp_path)
    assert isinstance(data.ids, np.memmap)
    before = data.fingerprint()
    shutil.rmtree(tmp_path)
    assert data.fingerprint() == before


def test_a_full_disk_is_an_error_where_tokens_are_written(tmp_path, monkeypatch):
    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr(utils.texts.tokens, "open", lambda _, mode: full(mode), raising=False)
    with pytest.raises(OSError, match="No space left"):
        tokens(ROWS, tmp_path)


def test_the_fingerprint_sees_one_changed_token(tmp_path):
    first, second = (tokens([{"instruction": text}], tmp_path / text) for text in "ab")
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == first.fingerprint()


def test_a_rows_key_is_its_own_wherever_it_stands(tmp_path):
    keys = tokens(ROWS, tmp_path).keys()
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == len(ROWS)
    fewer = tokens([*ROWS[4:], ROWS[0]], tmp_path).keys()
    assert fewer.tolist() == [*keys[4:], keys[0]]
    # Where the loss begins is part of a row.
    whole = tokens(ROWS, tmp_path)
    later = dataclasses.replace(whole, loss_starts=whole.loss_starts + 1).keys()
    assert not set(later.tolist()) & set(keys.tolist())


def test_rows_without_text_and_answers_that_never_fit_are_refused(tmp_path):
    with pytest.raises(UsageError, match="row 1, column 'answer': NoneType"):
        tokens([ROWS[0], {"instruction": "x", "answer": None}], tmp_path, "vicuna", 99)
    with pytest.raises(UsageError, match="--max_seq_len 10"):
        tokens(ROWS, tmp_path, "vicuna", 10)
