"""Pickled lists of strings, and pickles that mean harm."""

import os
import pickle
import struct
import subprocess
import sys

import pytest

from utils.cli import UsageError
from utils.texts.pickles import read_pickled_strings

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
