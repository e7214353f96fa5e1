"""Finding, counting, loading and tokenising data sets."""

import json
import shutil

import datasets
import numpy as np
import pytest

import utils.texts.tokens
from privacy_checks.tiny_model import byte_tokenizer
from utils.cli import UsageError
from utils.texts.data_sets import count_train_examples, find_dataset, load_splits
from utils.texts.tokens import open_tokens, tokenise, tokenised

ROWS = [{"instruction": f"say {n}", "answer": str(n)} for n in range(7)]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()


def save(kind: str, name: str, rows=ROWS):
    train, val = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(ROWS[:2])
    if kind == "saved":
        datasets.DatasetDict(train=train, val=val).save_to_disk(f"data/{name}")
    elif kind == "parquet":
        train.to_parquet(f"data/{name}.parquet")
    elif kind == "jsonl":
        with open(f"data/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind == "json":
        with open(f"data/{name}.json", "w") as file:
            json.dump(rows, file)


@pytest.mark.parametrize("kind", ["saved", "parquet", "jsonl", "json"])
def test_every_form_is_counted_without_loading_and_loaded(kind):
    save(kind, "labelled_x")
    assert count_train_examples("labelled_x") == 7
    splits = load_splits("labelled_x")
    assert list(splits["train"]) == ROWS
    assert ("val" in splits) == (kind == "saved")


def test_the_count_is_of_rows_kept_not_of_rows_once_there():
    kept = datasets.Dataset.from_list(ROWS).filter(lambda row: row["answer"] > "3")
    datasets.DatasetDict(train=kept).save_to_disk("data/x")
    assert count_train_examples("x") == 3 == len(load_splits("x")["train"])


def test_names_resolve_to_data_first_then_to_a_path(tmp_path):
    save("jsonl", "x")
    (tmp_path / "x.jsonl").write_text("")
    assert str(find_dataset("x")) == "data/x.jsonl"
    assert find_dataset(str(tmp_path / "data" / "x.jsonl")) == tmp_path / "data" / "x.jsonl"
    assert find_dataset("org/name") is None
    assert count_train_examples("org/name") is None


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("x", [], "no example in its train split"),
        ("x", [{"text": "hi"}], "lacks column 'instruction': it has"),
        ("labelled_x", [{"instruction": "hi"}], "lacks column 'answer'"),
    ],
)
def test_wrong_data_is_refused(name, rows, message):
    save("json", name, rows)
    with pytest.raises(UsageError, match=message):
        load_splits(name)


def test_torn_lines_and_other_json_are_refused():
    for name, text in (("a.jsonl", '{"instruction": "x"}\n{"instr'), ("b.json", '{"a": 1}')):
        with open(f"data/{name}", "w") as file:
            file.write(text)
        with pytest.raises(UsageError, match="cannot read data set"):
            load_splits(name.split(".")[0])


def test_an_unknown_name_tells_what_was_tried_and_what_makes_data(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"tried data/nowhere.*prepare_chatbot_arena"):
        load_splits("nowhere")


def test_a_single_saved_split_is_explained():
    datasets.Dataset.from_list(ROWS).save_to_disk("data/x")
    with pytest.raises(UsageError, match="one saved split"):
        count_train_examples("x")


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


def test_the_fingerprint_sees_one_changed_token(tmp_path):
    first, second = (tokens([{"instruction": text}], tmp_path / text) for text in "ab")
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == first.fingerprint()


def test_rows_without_text_and_answers_that_never_fit_are_refused(tmp_path):
    with pytest.raises(UsageError, match="row 1, column 'answer': NoneType"):
        tokens([ROWS[0], {"instruction": "x", "answer": None}], tmp_path, "vicuna", 99)
    with pytest.raises(UsageError, match="--max_seq_len 10"):
        tokens(ROWS, tmp_path, "vicuna", 10)
