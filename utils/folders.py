"""Output folders: who may write to one, what it may go on with, and how it appears at once."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.cli import UsageError
from utils.files import fsync_folder, write_atomic, write_json

# How a prepared folder was made.
PREPARATION_FILE = "preparation.json"
LOCK_FILE = ".lock"
PRIVATE_README = """# Private

Everything in this folder was computed from private data without noise: losses, gradient norms,
clip fractions, realised batch sizes, embeddings, hashes of the data. No privacy guarantee covers
it. Do not share it, and do not choose what to publish by it without saying so.
"""


@contextmanager
def locked(
    place: Path, remedy: str, lock: Path | None = None, *, wait: bool = False
) -> Iterator[None]:
    """Hold `place` for this process, until the block ends or the process does, however it ends.

    Args:
        place: what is held, a folder or a file.
        remedy: what else a refused user can do, such as "use another --output".
        lock: the file that stands for it; `LOCK_FILE` in the folder `place` if None. It and its
            folder are made, and it goes when the block ends; a kill leaves it, held by nobody.
        wait: for the other process's end, in place of a refusal.

    Raises:
        UsageError: another process holds it, or its folder is a file.
    """
    lock = lock or place / LOCK_FILE
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{lock.parent} is a file or lies in one; {remedy}") from None
    held = FileLock(lock)
    try:
        held.acquire(blocking=wait)
    except Timeout:
        raise UsageError(
            f"{place} is in use by another process; wait for its end, stop it, or {remedy}"
        ) from None
    try:
        yield
    finally:
        # Removed while held: a process that opened this file before finds it gone, and makes
        # another.
        lock.unlink(missing_ok=True)
        held.release()


def sibling_lock(path: Path) -> Path:
    """The lock of a file, or of a folder that is replaced as a whole."""
    path = path.resolve()
    return path.with_name(f".{path.name}.lock")


def private_folder(path: Path, *, explained: bool = True) -> Path:
    """Make a folder that its owner alone may enter, whatever the umask, or tighten one.

    Args:
        path: folders above it are made as usual.
        explained: with a page that says what the folder is.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    if explained:
        write_atomic(path / "README.md", PRIVATE_README)
    return path


def names_in(folder: Path) -> set[str]:
    """What a folder holds besides its lock; nothing where there is none."""
    return {path.name for path in folder.glob("*")} - {LOCK_FILE}


def require_same_settings(
    before: Mapping[str, object],
    now: Mapping[str, object],
    where: str,
    remedy: str,
    *,
    shown: bool = True,
) -> None:
    """Refuse to go on with what was begun with other settings.

    Args:
        before, now: settings by name; a missing one is None.
        where: what was begun, up to the word "with", such as "outputs/mine holds a run with".
        remedy: what the user can do, such as "use another --output".
        shown: whether the message may hold values; private ones it may not.

    Raises:
        UsageError: names every setting that differs, with both values.
    """
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        words = [
            f"{name} {before.get(name)}, not {now.get(name)}" if shown else f"another {name}"
            for name in differing
        ]
        raise UsageError(f"{where} {', and '.join(words)}; {remedy}")


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Fill a temporary folder in the block; at its end it takes the place of `target`.

    A failure leaves `target` as it was, and so does a kill: one that falls between the two
    renames at the end leaves the old folder under another name, and the next call puts it back.
    That call also removes whatever else a kill left behind.

    Args:
        target: the folder to make; one that exists is replaced. Of a symbolic link, what it leads
            to is replaced.

    Yields:
        An empty folder next to `target`.

    Raises:
        UsageError: another process is making `target`.
    """
    target = Path(target).resolve()
    temporary = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    with locked(target, "name another folder", sibling_lock(target)):
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
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
        preparation: how the rows were made, kept next to them as `PREPARATION_FILE`.
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
