"""Instructions from every kind of file."""

import json
import pickle

import pytest
from datasets import Dataset, DatasetDict

from tests.json_lines import jsonl
from utils.cli import UsageError
from utils.texts.text_inputs import read_column, read_instructions

TEXTS = ["one", "two\nlines", "Grüße, 你好 😀", "### BOI", "x" * 300, "one"]


def write_shards(folder):
    folder.mkdir()
    for rank in (0, 1):
        rows = [{"id": i, "prompt": "", "text": text} for i, text in enumerate(TEXTS[rank::2])]
        torn = jsonl(rows) + '{"id": 9, "te'
        (folder / f"shard-{rank}.jsonl").write_text(torn, encoding="utf-8")


WRITERS = {
    "a.pkl": lambda path: path.write_bytes(pickle.dumps(TEXTS)),
    "strings.json": lambda path: path.write_text(json.dumps(TEXTS)),
    "objects.json": lambda path: path.write_text(
        json.dumps([{"instruction": text, "text": "other"} for text in TEXTS])
    ),
    "a.jsonl": lambda path: path.write_text(jsonl({"instruction": text} for text in TEXTS)),
    "b.jsonl": lambda path: path.write_text(jsonl({"text": text} for text in TEXTS)),
    "a.parquet": lambda path: Dataset.from_dict({"instruction": TEXTS}).to_parquet(str(path)),
    "dataset": lambda path: Dataset.from_dict({"instruction": TEXTS}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_same_instructions(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read_instructions(str(tmp_path / name)) == TEXTS


def test_sampling_shards_tolerate_a_torn_last_line(tmp_path):
    write_shards(tmp_path / "samples")
    assert sorted(read_instructions(str(tmp_path / "samples"))) == sorted(TEXTS)


def test_sampled_texts_without_an_end_are_left_out_and_counted(tmp_path, capsys):
    reasons = {"a": "stop", "cut": "length", "": "stop", "b": "stop", "none": "prompt_too_long"}
    rows = [
        {"id": i, "prompt": "", "text": text, "num_tokens": 9, "finish_reason": reason}
        for i, (text, reason) in enumerate(reasons.items())
    ]
    for rank in (0, 1):
        (tmp_path / f"shard-{rank}.jsonl").write_text(jsonl(rows[rank::2]))
    # The empty text stays until blank instructions are counted.
    assert read_instructions(str(tmp_path)) == ["a", "", "b"]
    assert capsys.readouterr().err.startswith("2 sampled texts left out")
    assert read_instructions(str(tmp_path / "shard-0.jsonl")) == ["a", ""]


def test_text_files_hold_lines_or_blocks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\r\n\ntwo\x0cpages\n", encoding="utf-8")
    assert read_instructions(str(path)) == ["one", "two\x0cpages"]
    path.write_text("### BOI ### 3\ntwo\nlines\n### EOI ###\n", encoding="utf-8")
    assert read_instructions(str(path)) == ["two\nlines"]


def test_a_saved_dataset_dict_needs_a_split(tmp_path):
    path = str(tmp_path / "d")
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(path)
    assert read_instructions(path, "train") == ["a"]
    with pytest.raises(UsageError, match="--split None: .* has train"):
        read_instructions(path)
    with pytest.raises(UsageError, match="--split 'test': .* has train"):
        read_instructions(path, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"", "unknown format"),
        ("a.csv", b"", "no first line with the names"),
        ("a.json", b"[", "cannot be read"),
        ("a.json", b'{"a": 1}', "must hold a list"),
        ("a.json", b"[]", "holds no instruction"),
        ("a.json", b'["a", 7]', "entry 2 .* int"),
        ("a.json", b'["a", "\\ud800"]', "entry 2, .*is not valid Unicode"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n', "entry 1 has no column .* 'text', only prompt"),
        ("a.jsonl", b'{"instruction": null}\n', "entry 1, column 'instruction' .* NoneType"),
        ("a.jsonl", b"[1]\n", "entry 1 .* int"),
        ("a.jsonl", b"oops\n", "line 1 is not a JSON object"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_unusable_files_are_explained(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_instructions(str(tmp_path / name))


def test_unusable_folders_and_paths_are_explained(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_instructions(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="neither a saved datasets folder"):
        read_instructions(str(tmp_path))
    Dataset.from_dict({"prompt": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UsageError, match="no column 'instruction' or 'text', only prompt"):
        read_instructions(str(tmp_path / "a.parquet"))


def test_a_column_is_read_of_the_texts_that_are_kept(tmp_path):
    """Whatever it holds, in the order of the texts; a sample that was cut has no place."""
    (tmp_path / "shard-0.jsonl").write_text(
        '{"text": "a", "user": 3, "finish_reason": "stop"}\n'
        '{"text": "b", "user": 4, "finish_reason": "length"}\n'
        '{"text": "c", "user": [5, null], "finish_reason": "stop"}\n'
    )
    assert read_instructions(str(tmp_path)) == ["a", "c"]
    assert read_column(str(tmp_path), None, "user") == [3, [5, None]]
    with pytest.raises(UsageError, match="shard-0.jsonl, entry 1 has no column 'owner'"):
        read_column(str(tmp_path), None, "owner")
    (tmp_path / "lines.txt").write_text("a\n")
    with pytest.raises(UsageError, match="lines.txt, entry 1 has no column 'user'"):
        read_column(str(tmp_path / "lines.txt"), None, "user")
