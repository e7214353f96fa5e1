"""Finding, counting and loading data sets."""

import hashlib
import json
from pathlib import Path

import datasets
import pytest

from tests.json_lines import jsonl
from utils.cli import UsageError
from utils.texts.data_sets import (
    count_train_examples,
    find_dataset,
    load_splits,
    rows_fingerprint,
)

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
        Path(f"data/{name}.jsonl").write_text(jsonl(rows))
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
    # The variable HF_HUB_OFFLINE was read when the library was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"tried data/nowhere.*prepare_chatbot_arena"):
        load_splits("nowhere")


def test_a_single_saved_split_is_explained():
    datasets.Dataset.from_list(ROWS).save_to_disk("data/x")
    with pytest.raises(UsageError, match="one saved split"):
        count_train_examples("x")


def test_a_fingerprint_tells_rows_and_their_order_apart_and_reads_them_once():
    fingerprints = {
        rows_fingerprint(iter(texts))
        for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""], [])
    }
    assert len(fingerprints) == 5
    # What folders of embeddings hold already.
    assert (
        rows_fingerprint(["é", "b"])
        == hashlib.sha256(b"\2\0\0\0\0\0\0\0\xc3\xa9\1\0\0\0\0\0\0\0b").hexdigest()
    )
