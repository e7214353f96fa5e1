"""Checkpoints survive kills, damage and full disks."""

import errno
import shutil

import pytest
import torch

import utils.runs.checkpointing
from tests.faults import on_small_disk
from tests.training import run_process
from utils.cli import UsageError
from utils.runs.checkpointing import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    SUMS_FILE,
    load_last_good,
    restore_adapter,
    save_checkpoint,
    step_of,
    whole_checkpoints,
)


def parameters(value=0.0):
    return {"a": torch.nn.Parameter(torch.full((3, 2), float(value))),
            "b": torch.nn.Parameter(torch.full((5,), float(value)))}  # fmt: skip


def save(folder, step, keep=2):
    weights = parameters(step)
    optimizer = torch.optim.AdamW(weights.values())
    sum(p.sum() for p in weights.values()).backward()
    optimizer.step()
    states = {"optimizer": optimizer.state_dict()}
    return save_checkpoint(folder, step, parameters(step), states, {"note": "x"}, keep)


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    checkpoint = load_last_good(tmp_path)
    assert checkpoint.state == {"note": "x", "step": 7}
    restored = parameters()
    restore_adapter(restored, checkpoint.adapter)
    assert all((tensor == 7).all() for tensor in restored.values())
    optimizer = torch.optim.AdamW(restored.values())
    optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    assert len(optimizer.state) == 2


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    assert load_last_good(tmp_path).state["step"] == 10


def test_no_checkpoint_is_none(tmp_path):
    assert load_last_good(tmp_path) is None


@pytest.mark.parametrize("name", [ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, name, damage, capsys):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit flipped":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert load_last_good(tmp_path).state["step"] == 1
    assert "step-000002 is damaged" in capsys.readouterr().err


def test_a_copy_under_another_name_is_the_users(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000002.bak")
    assert [step_of(path) for path in whole_checkpoints(tmp_path)] == [2, 1]
    for step in (3, 4, 5):
        save(tmp_path, step)
    assert (tmp_path / "step-000002.bak").is_dir()


@pytest.mark.parametrize("failing", ["save_file", "sha256_of", "write_json"])
def test_a_failed_save_leaves_the_previous_one_and_nothing_half_made(
    tmp_path, monkeypatch, failing
):
    save(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils.runs.checkpointing, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load_last_good(tmp_path).state["step"] == 1


def test_a_kill_before_the_rename_leaves_no_checkpoint_that_counts(tmp_path):
    save(tmp_path, 1)
    finished = save(tmp_path, 2)
    shutil.copytree(finished, tmp_path / ".step-000003.partial")
    (tmp_path / ".step-000003.partial" / ADAPTER_FILE).write_bytes(b"half")
    assert load_last_good(tmp_path).state["step"] == 2
    save(tmp_path, 3)
    assert load_last_good(tmp_path).state["step"] == 3
    assert not (tmp_path / ".step-000003.partial").exists()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / STATE_FILE).write_text("{")
    save(tmp_path, 2)
    assert load_last_good(tmp_path).state["step"] == 2


def test_names_and_shapes_that_differ_are_refused():
    with pytest.raises(UsageError, match="b: its shape is none in the checkpoint, and"):
        restore_adapter(parameters(), {"a": torch.zeros(3, 2)})
    # One that would be copied all the same: it fits every row.
    saved = {"a": torch.zeros(1, 2), "b": torch.zeros(5)}
    with pytest.raises(UsageError, match=r"a: .* \[1, 2\] in the checkpoint, and \[3, 2\] in"):
        restore_adapter(parameters(), saved)


FILLED = """
import os, shutil, torch
from utils.runs.checkpointing import load_last_good, save_checkpoint
weights = {"a": torch.nn.Parameter(torch.ones(50_000))}
optimizer = {"moments": [torch.ones(50_000), torch.ones(50_000)], "step": 1}
save_checkpoint("run", 1, weights, optimizer, {}, 2)
for room in (0, 8, 100, 250, 400, 590):
    disk = shutil.disk_usage(".")
    with open("ballast", "wb") as file:
        file.write(bytes(disk.free - room * 1024))
    try:
        save_checkpoint("run", 2, weights, optimizer, {}, 2)
        print(room, "saved")
    except OSError as error:
        print(room, error.errno, os.listdir("run"), load_last_good("run").state["step"])
    os.remove("ballast")
save_checkpoint("run", 2, weights, optimizer, {}, 2)
print(load_last_good("run").state["step"])
"""


def test_a_disk_that_is_full_at_any_point_costs_the_new_checkpoint_alone(tmp_path):
    finished = on_small_disk(tmp_path, "4m", "-c", FILLED)
    assert finished.returncode == 0, finished.stderr
    *full, last = finished.stdout.splitlines()
    assert full == [f"{room} 28 ['step-000001'] 1" for room in (0, 8, 100, 250, 400, 590)]
    assert last == "2"


def test_an_optimizer_that_the_disk_does_not_take_whole_is_no_checkpoint(tmp_path):
    """Not even where there is room for what is written after it."""
    script = """
import resource, sys
import torch
from utils.runs.checkpointing import load_last_good, save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    optimizer = {"moments": torch.zeros(100_000)}
    weights = {"a": torch.nn.Parameter(torch.zeros(9))}
    save_checkpoint(sys.argv[1], 1, weights, optimizer, {}, keep=2)
except OSError as error:
    print(error.errno, load_last_good(sys.argv[1]))
"""
    finished = run_process("-c", script, str(tmp_path))
    assert finished.stdout == f"{errno.EFBIG} None\n", finished.stderr
