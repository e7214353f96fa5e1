"""The folder of sampled texts: manifest and shards, which a stopped run goes on with."""

import fcntl
import json
from pathlib import Path
from typing import TextIO

from utils.cli import UsageError
from utils.files import read_jsonl

MANIFEST_FILE = "manifest.json"


def wait_for_other_processes(lock: TextIO) -> None:
    """Return when no other process of this run shares the lock any more."""
    fcntl.flock(lock, fcntl.LOCK_EX)


def check_manifest(folder: Path, settings: dict) -> None:
    """Refuse to add samples to others that were drawn with other settings.

    Args:
        settings: what this run is to share with the samples in `folder`.

    Raises:
        UsageError: names the setting, the value of the samples there, and this run's.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        if any(folder.glob("shard-*.jsonl")):
            raise UsageError(f"{folder} holds samples without {MANIFEST_FILE}; use another "
                             "--job_sess")  # fmt: skip
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise UsageError(f"{path} is damaged; use another --job_sess")
    for name, value in settings.items():
        if name in there and there[name] != value:
            raise UsageError(
                f"{folder} holds samples with {name} {there[name]}, not {value}; use that one, or "
                "another --job_sess"
            )


def finish_reasons(folder: Path) -> dict[int, str]:
    """Why each sample in `folder` ended, by its id; what is not in here is still to be drawn.

    Raises:
        UsageError: a line is no sample, or a sample is there twice.
    """
    reasons = {}
    for shard in sorted(folder.glob("shard-*.jsonl")):
        for number, record in enumerate(read_jsonl(shard), start=1):
            id, reason = record.get("id"), record.get("finish_reason")
            if not (type(id) is int and isinstance(reason, str)):
                raise UsageError(f"{shard}, line {number} is no sample: it lacks id or "
                                 "finish_reason; remove it, or use another --job_sess")  # fmt: skip
            if id in reasons:
                raise UsageError(f"{shard}, line {number}: sample {id} is there a second time; "
                                 "remove one of them, or use another --job_sess")  # fmt: skip
            reasons[id] = reason
    return reasons


def read_samples(folder: Path) -> list[dict]:
    """All samples of a folder in order of their ids.

    Raises:
        UsageError: the folder holds no shard.
    """
    shards = sorted(folder.glob("shard-*.jsonl"))
    if not shards:
        raise UsageError(f"--samples {str(folder)!r}: no shard-*.jsonl there; inference.py writes")
    return sorted((sample for shard in shards for sample in read_jsonl(shard)), key=by_id)


def by_id(sample: dict) -> int:
    """The sample's number."""
    return sample["id"]
