"""Folders that appear whole or not at all, under failures and real kills."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

from utils.folders import PREPARATION_FILE, save_dataset, whole_folder

ROOT = Path(__file__).resolve().parents[1]


def fill(target, text):
    with whole_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)


def text_in(target):
    return (target / "deep" / "file").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_at_rename(target, number):
    """Fill `target` in a process that is killed in place of its rename `number` (from 1)."""
    script = f"""
import os, signal
from pathlib import Path
from utils.folders import whole_folder
rename, calls = Path.rename, []
def rename_or_die(self, name):
    calls.append(name)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, name)
Path.rename = rename_or_die
with whole_folder({str(target)!r}) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("new")
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL


def test_the_target_appears_at_the_end_and_alone(tmp_path):
    target = tmp_path / "missing" / "target"
    with whole_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert names(target.parent) == ["target"]
    assert names(target) == ["file"]


def test_an_existing_folder_is_replaced_not_merged(tmp_path):
    fill(tmp_path / "target", "old")
    with whole_folder(tmp_path / "target") as folder:
        (folder / "other").write_text("new")
        assert text_in(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["other"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, failure):
    fill(tmp_path / "target", "old")

    def fail():
        with whole_folder(tmp_path / "target") as folder:
            (folder / "half").write_text("new")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert names(tmp_path) == ["target"]
    assert text_in(tmp_path / "target") == "old"


def test_what_a_kill_left_half_made_is_not_in_the_next_result(tmp_path):
    target = tmp_path / "target"
    killed_at_rename(target, 1)
    assert not target.exists()
    with whole_folder(target) as folder:
        assert names(folder) == []
        (folder / "file").write_text("x")
    assert names(tmp_path) == ["target"]
    assert names(target) == ["file"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_at_either_rename_loses_nothing_of_the_old_folder(tmp_path, number):
    target = tmp_path / "target"
    fill(target, "old")
    killed_at_rename(target, number)
    with pytest.raises(RuntimeError), whole_folder(target):
        raise RuntimeError
    assert names(tmp_path) == ["target"]
    assert text_in(target) == "old"


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def record_rename(self, name):
        events.append("rename")
        return rename(self, name)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    fill(tmp_path / "target", "x")
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    assert set(before) == {"file", "deep", ".target.partial"}
    assert after == ["rename", tmp_path.name]


def test_a_data_set_is_saved_with_its_columns_and_how_it_was_made(tmp_path):
    rows = [{"instruction": f"ask {n}", "answer": f"say {n}"} for n in range(3)]
    splits = {"train": rows[:2], "test": rows[2:]}
    save_dataset(tmp_path / "pairs", splits, ["instruction", "answer"], {"seed": 0})
    save_dataset(tmp_path / "alone", splits, ["instruction"], {"seed": 0})
    pairs, alone = (load_from_disk(tmp_path / name) for name in ("pairs", "alone"))
    assert {name: part.to_list() for name, part in pairs.items()} == splits
    assert alone["train"].to_list() == [{"instruction": "ask 0"}, {"instruction": "ask 1"}]
    assert '"seed": 0' in (tmp_path / "pairs" / PREPARATION_FILE).read_text()
