"""Atomic checkpoints that know whether they are whole, and the way back from them."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from utils.cli import UsageError, disk_error, say
from utils.files import sha256_of, write_json
from utils.folders import whole_folder

ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = "adapter.safetensors", "optimizer.pt", "state.json"
SUMS_FILE = "sha256.json"
# Of a checkpoint's folder; the step follows.
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back whole."""

    path: Path
    adapter: dict[str, torch.Tensor]
    optimizer: dict
    state: dict


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: dict,
    state: dict,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN`, then remove all but the newest `keep` checkpoints.

    Everything is written and fsynced under a temporary name and then renamed, so a kill at any
    moment leaves either the whole checkpoint or none, and the older ones untouched.

    Args:
        optimizer: a dict of tensors and plain values.
        state: JSON-able; gets `step`.

    Raises:
        OSError: the disk takes no more; older checkpoints are untouched.
    """
    folder = Path(folder)
    final = folder / f"{PREFIX}{step:06d}"
    with whole_folder(final) as temporary:
        tensors = {name: tensor.detach().contiguous() for name, tensor in parameters.items()}
        try:
            save_file(tensors, temporary / ADAPTER_FILE)
        except SafetensorError as error:
            raise disk_error(error) or error from None
        with open(temporary / OPTIMIZER_FILE, "wb") as file:
            sink = _Sink(file)
            torch.save(optimizer, sink)
            sink.check()
        write_json(temporary / STATE_FILE, {**state, "step": step})
        sums = {file.name: sha256_of(file) for file in temporary.iterdir()}
        write_json(temporary / SUMS_FILE, sums)
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


class _Sink:
    """A file for `torch.save`, which has no way to say that a disk is full: keeps the error."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: `check` does it."""

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error
        self._file.flush()


def load_last_good(folder: str | os.PathLike) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; a damaged one is named and passed over."""
    return next(map(read_checkpoint, whole_checkpoints(folder)), None)


def whole_checkpoints(folder: str | os.PathLike) -> Iterator[Path]:
    """All checkpoints that are whole, the newest first; damaged ones are named."""
    for path in _checkpoints(Path(folder)):
        damage = _damage(path)
        if damage is None:
            yield path
        else:
            say(f"warning: {path} is damaged ({damage}); trying the one before it")


def step_of(path: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(path.name.removeprefix(PREFIX))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that is whole."""
    return Checkpoint(
        path=path,
        adapter=load_file(path / ADAPTER_FILE),
        optimizer=torch.load(path / OPTIMIZER_FILE, weights_only=True, map_location="cpu"),
        state=json.loads((path / STATE_FILE).read_text()),
    )


def restore_adapter(parameters: dict[str, nn.Parameter], saved: dict[str, torch.Tensor]) -> None:
    """Copy saved values into tensors of the adapter.

    Raises:
        UsageError: the names or shapes differ; the message names a tensor.
    """
    shapes, saved_shapes = (
        {name: list(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (parameters, saved)
    )
    for name in sorted(shapes.keys() | saved_shapes.keys()):
        if shapes.get(name) != saved_shapes.get(name):
            raise UsageError(
                f"{name}: its shape is {saved_shapes.get(name, 'none')} in the checkpoint, and "
                f"{shapes.get(name, 'none')} in this run's model; restore the run's own "
                "checkpoint, or use another --job_sess"
            )
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(saved[name])


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first; copies under other names are the user's."""
    named = folder.glob(f"{PREFIX}*")
    found = [path for path in named if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file has the hash that was written."""
    try:
        sums = json.loads((path / SUMS_FILE).read_text())
        for name in (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE):
            if sums[name] != sha256_of(path / name):
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None
