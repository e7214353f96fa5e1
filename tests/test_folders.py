"""Locks, settings that must stay, and folders that appear whole, under failures and real kills."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import save_file

from data import prepare_quickstart
from tests.paths import ROOT
from utils.cli import UsageError
from utils.files import write_atomic
from utils.folders import (
    LOCK_FILE,
    PREPARATION_FILE,
    claimed,
    locked,
    names_in,
    portable,
    portable_word,
    private_folder,
    require_same_settings,
    save_dataset,
    sibling_lock,
    whole_folder,
)


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


@contextlib.contextmanager
def holder(block):
    """A process that is in the `with` block named, until it is killed here."""
    script = f"""
import time
from pathlib import Path
from utils.folders import claimed, locked, sibling_lock, whole_folder
with {block}:
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


# ------------------------------------------------------------------ locks


def test_what_a_kill_leaves_of_a_write_is_not_the_users(tmp_path, monkeypatch):
    during = []
    monkeypatch.setattr(
        os, "replace", lambda *_: during.append((names(tmp_path), names_in(tmp_path)))
    )
    write_atomic(tmp_path / "manifest.json", "{}")
    (found, held) = during[0]
    assert len(found) == 1
    assert held == set()


def test_a_folder_has_one_holder_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "deep" / "run"
    with holder(f"locked(Path({str(folder)!r}), 'use another --job_sess')") as process:
        refusal = rf"^{folder} is in use by another process; .* or use another --job_sess$"
        with pytest.raises(UsageError, match=refusal), locked(folder, "use another --job_sess"):
            pass
        process.kill()
        process.wait()
        # What the killed process left holds nobody up, and is not the user's.
        assert names(folder) == [LOCK_FILE]
        assert names_in(folder) == set()
        with locked(folder, ""):
            (folder / "file").touch()
    assert names(folder) == ["file"]


def test_a_lock_that_waits_never_lets_two_in(tmp_path):
    path, inside, most = tmp_path / "ledger.jsonl", [], []

    def add():
        for _ in range(20):
            with locked(path, "", sibling_lock(path), wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1
    assert names(tmp_path) == []


def test_a_file_is_no_folder_to_hold(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UsageError, match="is a file or lies in one; name another"):
            locked(path, "name another").__enter__()


def test_a_link_to_nothing_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="link is a link to nothing; make .*gone"):
        claimed(tmp_path / "link").__enter__()
    assert names(tmp_path) == ["link"]


# ------------------------------------------------------------------ the same settings


def test_a_private_folder_is_for_its_owner_alone_whatever_the_umask(tmp_path, private_modes):
    folder = tmp_path / "run" / "private"
    assert private_folder(folder, explained=False) == folder
    assert private_modes == ["0o700"]
    assert list(folder.iterdir()) == []
    folder.chmod(0o777)
    assert "Do not share it" in (private_folder(folder) / "README.md").read_text()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_path_for_others_says_nothing_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "alice").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, shown in (
        ("yahma/llama-7b-hf", "yahma/llama-7b-hf"),
        ("models/llama", "models/llama"),
        (f"{tmp_path}/data/models/llama", "models/llama"),
        (f"{tmp_path}/alice/models/llama", "models/llama"),
        ("~/data/models", "models"),
        ("../data/models", "models"),
        (f"{tmp_path}/llama/", "llama"),
        ("../../alice/llama", "llama"),
    ):
        assert portable(given) == shown
        assert portable_word(given) == shown
        assert portable_word(f"--model_name={given}") == f"--model_name={shown}"


def test_every_setting_that_differs_is_named_with_both_values_and_the_remedy():
    before, now = {"lr": 0.1, "seed": 1, "old": 2}, {"lr": 0.2, "seed": 1, "new": "x"}
    require_same_settings(before, before.copy(), "a run with", "use another --job_sess")
    with pytest.raises(UsageError) as caught:
        require_same_settings(before, now, "outputs/a holds a run with", "use another --job_sess")
    assert str(caught.value) == (
        "outputs/a holds a run with lr 0.1, not 0.2, and old 2, not None, and new None, not x; "
        "use another --job_sess"
    )


def test_private_values_are_not_shown():
    with pytest.raises(UsageError, match="^a run with another hash; go away$") as caught:
        require_same_settings(
            {"hash": "abc"}, {"hash": "def"}, "a run with", "go away", shown=False
        )
    assert not {"abc", "def"} & set(str(caught.value).split())


# ------------------------------------------------------------------ whole folders


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


def test_two_processes_do_not_fill_one_target(tmp_path):
    target = tmp_path / "target"
    fill(target, "old")
    with holder(f"whole_folder({str(target)!r})") as process:
        with pytest.raises(UsageError, match=rf"^{target} is in use by another process"):
            fill(target, "new")
        assert text_in(target) == "old"
        process.kill()
        process.wait()
        fill(target, "new")
    assert names(tmp_path) == ["target"]
    assert text_in(target) == "new"


def test_what_a_link_leads_to_is_replaced(tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    fill(real, "old")
    link.symlink_to(real)
    fill(link, "new")
    assert link.is_symlink()
    assert text_in(real) == text_in(link) == "new"
    assert (names(tmp_path), names(real.parent)) == (["disk", "link"], ["real"])


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


def test_who_may_read_a_folder_may_read_its_files(tmp_path):
    tensors = {"one": torch.zeros(1)}
    with whole_folder(tmp_path / "open") as folder:
        folder.chmod(0o750)
        save_file(tensors, folder / "adapter.safetensors")  # it writes for the owner alone
        save_file(tensors, private_folder(folder / "private") / "own.safetensors")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "open").rglob("*.s*")}
    assert modes == {"adapter.safetensors": 0o640, "own.safetensors": 0o600}


def test_what_a_link_leads_to_is_not_opened(tmp_path):
    (tmp_path / "outside").touch(mode=0o600)
    with whole_folder(tmp_path / "target") as folder:
        (folder / "link").symlink_to(tmp_path / "outside")
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_its_owner_closed_stays_closed(tmp_path):
    fill(tmp_path / "target", "old")
    (tmp_path / "target").chmod(0o700)
    fill(tmp_path / "target", "new")
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o700


def test_a_data_set_is_saved_with_its_columns_and_how_it_was_made(tmp_path):
    rows = [{"instruction": f"ask {n}", "answer": f"say {n}"} for n in range(3)]
    splits = {"train": rows[:2], "test": rows[2:]}
    save_dataset(tmp_path / "pairs", splits, ["instruction", "answer"], {"seed": 0})
    save_dataset(tmp_path / "alone", splits, ["instruction"], {"seed": 0})
    pairs, alone = (load_from_disk(tmp_path / name) for name in ("pairs", "alone"))
    assert {name: part.to_list() for name, part in pairs.items()} == splits
    assert alone["train"].to_list() == [{"instruction": "ask 0"}, {"instruction": "ask 1"}]
    assert '"seed": 0' in (tmp_path / "pairs" / PREPARATION_FILE).read_text()


# ------------------------------------------------------------------ two of one command


COMMANDS = {
    "resample_with_dp_histogram.extract": ["--instructions", "x", "--output"],
    "query_gpt35_for_annotation.build_dataset": ["--answers", "x", "--output"],
    "resample_with_dp_histogram.resample": [
        "--private_embeddings", "x", "--synthetic_embeddings", "x", "--synthetic_instructions", "x",
        "--output",
    ],
    "topics.fit": ["--public", "x", "--output"],
    "topics.assign": ["--private", "x", "--topics", "x", "--output"],
    "topics.histogram": ["--assigned", "x", "--output"],
    "evaluation.report": ["x", "--output"],
    "privacy_checks.report": ["x", "--output"],
    "data.prepare_chatbot_arena": ["--overwrite", "--pairs", "--output"],
    "data.prepare_alpaca_eval": ["--overwrite", "--output"],
}  # fmt: skip


def test_of_two_of_one_command_on_one_output_the_second_hears_who_holds_it(tmp_path):
    output = tmp_path / "deep" / "labelled_output"
    with holder(f"claimed(Path({str(output)!r}))") as process:
        for command, arguments in COMMANDS.items():
            main = importlib.import_module(command).main
            refusal = rf"^{output} is in use by another process; .*\(process {process.pid}: .*-c"
            with pytest.raises(UsageError, match=refusal):
                main([*arguments, str(output)])
    assert not output.exists()


def test_the_quick_start_is_prepared_by_one_process_at_a_time(tmp_path):
    refused = pytest.raises(UsageError, match="quickstart is in use by another process")
    with holder(f"claimed(Path({str(tmp_path / 'quickstart')!r}))"), refused:
        prepare_quickstart.main(["--overwrite", "--output_dir", str(tmp_path)])


def test_a_claim_leaves_no_folder_that_it_made(tmp_path):
    with claimed(tmp_path / "a" / "b" / "output"), whole_folder(tmp_path / "a" / "b" / "output"):
        assert (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a" / "b") == ["output"]
    with claimed(tmp_path / "c" / "d" / "output"):
        pass
    assert not (tmp_path / "c").exists()
