"""Files that survive a kill: atomic writes, and JSON lines that heal a torn end."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.faults import on_small_disk
from tests.paths import ROOT
from utils.cli import UsageError
from utils.files import (
    JsonlAppender,
    json_lines,
    json_object,
    placed_records,
    read_jsonl,
    record_at,
    require_fetched,
    sha256_of,
    write_atomic,
    write_json,
)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path, size, versions = tmp_path / "file", 1 << 20, [b"a", b"b"]
    write_atomic(path, versions[0] * size)
    done = threading.Event()

    def write():
        for turn in range(40):
            write_atomic(path, versions[turn % 2] * size)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        content = path.read_bytes()
        seen.add((len(content), *set(content)))
    writer.join()
    assert seen <= {(size, version[0]) for version in versions}
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    script = f"""
import os, signal
from utils.files import write_atomic
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomic({str(path)!r}, "new")
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("name"), replace(*names)))
    write_atomic(tmp_path / "new_folder" / "file", "text")
    assert events == ["fsync", "name", "fsync"]


def test_json_keeps_other_scripts_readable(tmp_path):
    write_json(tmp_path / "file", {"name": "größer", "values": [1, None]})
    text = (tmp_path / "file").read_text()
    assert "größer" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "größer", "values": [1, None]}


def test_the_hash_of_a_file(tmp_path):
    # FIPS 180-4's example, and a file larger than any buffer.
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    (tmp_path / "large").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


RECORDS = [{"text": "line\nbreak"}, {"text": "\u2028 and é"}, {"text": ""}]


def write_lines(path, *lines):
    path.write_bytes(b"".join(lines))
    return path


def test_records_survive_the_round_trip(tmp_path):
    path = tmp_path / "folder" / "file.jsonl"
    with JsonlAppender(path) as file:
        file.append(RECORDS[:1])
        file.append(RECORDS[1:])
        assert list(read_jsonl(path)) == RECORDS  # on the disk before `close`
    with JsonlAppender(path) as file:
        file.append(RECORDS[:1])
    assert list(read_jsonl(path)) == RECORDS + RECORDS[:1]


@pytest.mark.parametrize("whole", [b"", b'{"id": 1}\n', b'{"id": 1}\n' * 9000])
@pytest.mark.parametrize("torn", [b"", b'{"id": 2', b'{"id": 2}', b'{"id": "' + b"x" * 200_000])
def test_a_torn_last_line_is_passed_over_and_cut_off_on_opening(tmp_path, whole, torn):
    path = write_lines(tmp_path / "file.jsonl", whole, torn)
    before = list(read_jsonl(path))
    assert before == [{"id": 1}] * whole.count(b"\n")
    with JsonlAppender(path) as file:
        file.append([{"id": 3}])
    assert path.read_bytes() == whole + b'{"id": 3}\n'


@pytest.mark.parametrize("line", [b"{half\n", b"[1]\n", b"7\n", b"\n", b'{"a": "\xff"}\n'])
def test_a_complete_line_that_is_no_object_is_named(tmp_path, line):
    path = write_lines(tmp_path / "file.jsonl", b'{"id": 1}\n', line, b'{"id": 3}\n')
    with pytest.raises(UsageError, match=r"file\.jsonl, line 2 is not a JSON object"):
        list(read_jsonl(path))


def test_an_append_is_on_the_disk_when_it_returns(tmp_path, monkeypatch):
    with JsonlAppender(tmp_path / "file.jsonl") as file:
        sizes, fsync = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda f: (sizes.append(os.fstat(f).st_size), fsync(f)))
        file.append([{"id": 1}, {"id": 2}])
    assert sizes == [20]


def test_a_kill_among_appends_loses_no_record_that_was_acknowledged(tmp_path):
    path = tmp_path / "file.jsonl"
    script = f"""
from utils.files import JsonlAppender
with JsonlAppender({str(path)!r}) as file:
    for number in range(10**9):
        file.append([{{"id": number, "text": "x" * 5000}}])
        print(number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    acknowledged = [int(process.stdout.readline()) for _ in range(20)][-1]
    process.kill()
    process.communicate()
    ids = [record["id"] for record in read_jsonl(path)]
    assert ids == list(range(len(ids)))
    assert len(ids) > acknowledged


APPENDING = """
import os
from utils.files import JsonlAppender, read_jsonl
with open("ballast", "wb") as file:
    file.write(bytes((1 << 20) - 3 * 4096))
with JsonlAppender("log") as log:
    kept = failed = 0
    while failed < 5:
        try:
            log.append([{"number": kept, "text": "x" * 300}] * 3)
            kept += 1
        except OSError as error:
            failed += 1
            assert error.errno == 28
    os.remove("ballast")
    log.append([{"number": "last"}])
numbers = [record["number"] for record in read_jsonl("log")]
assert numbers == [n for n in range(kept) for _ in range(3)] + ["last"], numbers
print(kept)
"""


def test_what_a_full_disk_did_not_take_leaves_no_part_of_itself(tmp_path):
    finished = on_small_disk(tmp_path, "1m", "-c", APPENDING)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 2


def test_places_of_records_lead_back_to_them(tmp_path):
    path = tmp_path / "log"
    records = [{"text": "é\u2028x" * number} for number in range(5)]
    path.write_text(json_lines(records) + '{"torn')
    placed = list(placed_records(path))
    assert [record for _, record in placed] == records
    with open(path, "rb") as file:
        assert [record_at(file, place) for place, _ in reversed(placed)] == records[::-1]


def test_a_line_that_is_too_deep_is_named(tmp_path):
    (tmp_path / "log").write_text('{"a": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UsageError, match="line 2 is not a JSON object"):
        list(read_jsonl(tmp_path / "log"))


def test_a_pointer_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    require_fetched(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(UsageError, match="model.safetensors is a git-lfs pointer .* git lfs pull"):
        require_fetched(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff", b'"text"'])
def test_what_is_no_object_reads_as_an_empty_one(tmp_path, content):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    assert json_object(path) == {}
    path.write_text('{"a": "é"}', encoding="utf-8")
    assert json_object(path) == {"a": "é"}
