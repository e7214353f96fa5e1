"""Output folders that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from utils.cli import UsageError
from utils.files import fsync_folder, write_json

# How a prepared folder was made.
PREPARATION_FILE = "preparation.json"


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Fill a temporary folder in the block; at its end it takes the place of `target`.

    A failure leaves `target` as it was, and so does a kill: one that falls between the two
    renames at the end leaves the old folder under another name, and the next call puts it back.
    That call also removes whatever else a kill left behind, so two calls for one target must not
    run at the same time.

    Args:
        target: the folder to make; one that exists is replaced.

    Yields:
        An empty folder next to `target`.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(parent)


def save_dataset(
    target: str | os.PathLike, splits: dict[str, list[dict]], columns: list[str], preparation: dict
) -> None:
    """Save `columns` of the rows of each split as a `DatasetDict`, whole or not at all.

    Args:
        target: the folder to make; one that exists is replaced.
        splits: rows by split, none of them empty.
        preparation: how the rows were made, kept beside them as `PREPARATION_FILE`.
    """
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    with whole_folder(target) as folder:
        DatasetDict(
            {
                name: Dataset.from_dict(
                    {column: [row[column] for row in rows] for column in columns}
                )
                for name, rows in splits.items()
            }
        ).save_to_disk(folder)
        write_json(folder / PREPARATION_FILE, preparation)


def lock_folder(folder: Path, *, shared: bool) -> TextIO:
    """Keep other runs out of `folder` until what is returned is closed, or the process ends.

    The first process of a run takes the lock for itself, and shares it with the others once the
    folder is in order. A run's lock lasts as long as any of its processes.

    Raises:
        UsageError: another run has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 (the caller holds it)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(
            f"another run is sampling into {folder}; wait for its end, stop it, or use another "
            "--job_sess"
        ) from None
    return lock
