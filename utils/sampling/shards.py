"""The folder of sampled texts: manifest and shards, which a stopped run goes on with.

A sample is known by its number, unique in its folder, and the shard that holds it. A shard's lines
call the number `id`, which is their published form; everywhere else it is `sample_id`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.cli import UsageError
from utils.files import read_jsonl
from utils.folders import LOCK_FILE, locked, require_same_settings

MANIFEST_FILE = "manifest.json"


def shards_of(folder: Path) -> list[Path]:
    """The files of samples in `folder`, in order of their names."""
    return sorted(folder.glob("shard-*.jsonl"))


def _lock_of(folder: Path, rank: int) -> Path:
    return folder / (f"{LOCK_FILE}-{rank}" if rank else LOCK_FILE)


@contextmanager
def rank_locked(folder: Path, rank: int) -> Iterator[None]:
    """Hold `folder` for one process of a run, rank 0 before the others.

    A run lasts as long as any of its processes: each holds a lock of its own, and rank 0 is
    refused while a process of an earlier run holds one.

    Raises:
        UsageError: another run has the folder.
    """
    remedy = "use another --job_sess"
    with locked(folder, remedy, _lock_of(folder, rank)):
        if rank == 0:
            for lock in folder.glob(f"{LOCK_FILE}-*"):
                with locked(folder, remedy, lock):
                    pass
        yield


def wait_for_other_ranks(folder: Path, num_ranks: int) -> None:
    """Return when no other process of this run holds `folder` any more."""
    for rank in range(1, num_ranks):
        with locked(folder, "", _lock_of(folder, rank), wait=True):
            pass


def check_manifest(folder: Path, settings: dict) -> None:
    """Refuse to add samples to others that were drawn with other settings.

    Args:
        settings: what this run is to share with the samples in `folder`, as far as their manifest
            knows it.

    Raises:
        UsageError: names the settings, the values of the samples in `folder`, and this run's.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        if any(folder.glob("shard-*.jsonl")):
            raise UsageError(f"{folder} holds samples without {MANIFEST_FILE}; use another "
                             "--job_sess")  # fmt: skip
        return
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UsageError(f"{path} is damaged; use another --job_sess")
    known = settings.keys() & manifest.keys()
    require_same_settings(
        {name: manifest[name] for name in settings if name in known},
        {name: settings[name] for name in settings if name in known},
        f"{folder} holds samples with",
        "use what they have, or another --job_sess",
    )


def finish_reasons(folder: Path) -> dict[int, str]:
    """Why each sample in `folder` ended, by its number; what is not in here is still to be drawn.

    Raises:
        UsageError: a line is not a sample, or a sample comes twice.
    """
    reasons: dict[int, str] = {}
    for shard in shards_of(folder):
        for number, record in enumerate(read_jsonl(shard), start=1):
            sample_id, reason = record.get("id"), record.get("finish_reason")
            if not (type(sample_id) is int and isinstance(reason, str)):
                raise UsageError(f"{shard}, line {number} is not a sample: it lacks id or "
                                 "finish_reason; remove it, or use another --job_sess")  # fmt: skip
            if sample_id in reasons:
                raise UsageError(f"{shard}, line {number}: sample {sample_id} comes a second time; "
                                 "remove one of them, or use another --job_sess")  # fmt: skip
            reasons[sample_id] = reason
    return reasons


def read_samples(folder: Path) -> list[dict]:
    """All samples of a folder in order of their numbers.

    Raises:
        UsageError: the folder holds no shard, or a line is no sample.
    """
    shards = shards_of(folder)
    if not shards:
        raise UsageError(f"--samples {str(folder)!r}: no shard-*.jsonl there; inference.py writes")
    samples = []
    for shard in shards:
        for number, sample in enumerate(read_jsonl(shard), start=1):
            texts = (sample.get("prompt"), sample.get("text"))
            if type(sample.get("id")) is not int or not all(isinstance(t, str) for t in texts):
                raise UsageError(
                    f"{folder} is no folder of samples: {shard.name}, line {number} lacks an id, a "
                    "prompt or a text; restore it"
                )
            samples.append(sample)
    return sorted(samples, key=by_id)


def by_id(sample: dict) -> int:
    """The sample's number."""
    return sample["id"]
