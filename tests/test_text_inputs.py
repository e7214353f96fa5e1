"""Instructions from every kind of file, and pickles that mean harm."""

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

from utils.cli import UsageError
from utils.texts.text_inputs import read_instructions, read_pickled_strings

TEXTS = ["one", "two\nlines", "Grüße, 你好 😀", "### BOI", "x" * 300, "one"]


class Harm:
    """Pickles to a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "elsewhere" if value == "one" else None


def persistent_pickle(folder) -> bytes:
    with open(folder / "p", "wb") as file:
        Persistent(file).dump(["one", "two"])
    return (folder / "p").read_bytes()


HOSTILE = {
    "reduce": pickle.dumps(Harm()),
    "reduce in a list": pickle.dumps(["one", Harm()]),
    "reduce, text protocol": pickle.dumps([Harm()], protocol=0),
    "global": b"cos\nsystem\n(S'touch harmed'\ntR.",
    "instance": b"(S'touch harmed'\nios\nsystem\n.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.",
    "global after the stop of a list": b"](cos\nsystem\nX\x05\x00\x00\x00touchtR.",
    "extension": b"\x80\x02\x82\x01.",
    "build": b"\x80\x02]}b.",
    "nested list": pickle.dumps([["one"], "two"]),
    "dictionary": pickle.dumps({"instruction": "one"}),
    "bytes": pickle.dumps([b"one"]),
    "number": pickle.dumps(["one", 2]),
    "a list that holds itself": b"]q\x00h\x00a.",
    "string of 4 EiB": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"short",
    "bytearray of 1 EiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "number of 2 GiB": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "no stop": b"\x80\x04]\x94",
    "stack underflow": b"a.",
    "unknown memo": b"h\x07.",
    "no pickle": b"hello",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        read_pickled_strings(HOSTILE[name])
    assert os.listdir(tmp_path) == []


def test_the_hostile_pickles_do_harm_when_unpickled(tmp_path, monkeypatch):
    """Or else the test above would show nothing."""
    monkeypatch.chdir(tmp_path)
    harmful = ("reduce", "reduce in a list", "reduce, text protocol", "global", "instance")
    for name in harmful:
        pickle.loads(HOSTILE[name])
        os.remove("harmed")


def test_persistent_ids_are_refused(tmp_path):
    with pytest.raises(UsageError, match="BINPERSID"):
        read_pickled_strings(persistent_pickle(tmp_path))


def test_a_huge_memo_index_takes_no_memory():
    """The C unpickler allocates an array as long as the largest index."""
    assert read_pickled_strings(b"]r\xff\xff\xff\x7fX\x01\x00\x00\x00aa.") == ["a"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_strings_are_read_at_every_protocol(protocol):
    texts = TEXTS * 700  # several batches of APPENDS, and memo references to repeated strings
    assert read_pickled_strings(pickle.dumps(texts, protocol)) == texts
    assert read_pickled_strings(pickle.dumps([], protocol)) == []


def test_a_hostile_pickle_ends_the_command_with_code_2(tmp_path):
    (tmp_path / "bad.pkl").write_bytes(HOSTILE["reduce"])
    command = [sys.executable, "-m", "query_gpt35_for_annotation.annotate", "--dry_run"]
    done = subprocess.run(
        [*command, "--instructions", "bad.pkl", "--output", "out"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: a .pkl may hold a list of strings and nothing else")
    assert os.listdir(tmp_path) == ["bad.pkl"]


def write_shards(folder):
    folder.mkdir()
    for rank in (0, 1):
        rows = [{"id": i, "prompt": "", "text": text} for i, text in enumerate(TEXTS[rank::2])]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"shard-{rank}.jsonl").write_text(lines + '{"id": 9, "te', encoding="utf-8")


def jsonl(key):
    return "".join(json.dumps({key: text}) + "\n" for text in TEXTS)


WRITERS = {
    "a.pkl": lambda path: path.write_bytes(pickle.dumps(TEXTS)),
    "strings.json": lambda path: path.write_text(json.dumps(TEXTS)),
    "objects.json": lambda path: path.write_text(
        json.dumps([{"instruction": text, "text": "other"} for text in TEXTS])
    ),
    "a.jsonl": lambda path: path.write_text(jsonl("instruction")),
    "b.jsonl": lambda path: path.write_text(jsonl("text")),
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
        lines = "".join(json.dumps(row) + "\n" for row in rows[rank::2])
        (tmp_path / f"shard-{rank}.jsonl").write_text(lines)
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
        ("a.csv", b"", "unknown format"),
        ("a.json", b"[", "cannot be read"),
        ("a.json", b'{"a": 1}', "must hold a list"),
        ("a.json", b"[]", "holds no instruction"),
        ("a.json", b'["a", 7]', "entry 2 .* int"),
        ("a.json", b'["a", "\\ud800"]', "instruction 2 is not valid Unicode"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b'{"prompt": "a"}\n', "entry 1 .* NoneType"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
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
