"""Output folders: who may write to one, what it may go on with, and how it appears at once."""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

from utils.cli import UsageError
from utils.files import TEMPORARIES, fsync_folder, sha256_of, write_atomic, write_json
from utils.printable import printable

if TYPE_CHECKING:
    from datasets import Dataset

# How a prepared folder was made.
PREPARATION_FILE = "preparation.json"
LOCK_FILE = ".lock"
ROWS_AT_ONCE = 1000  # of a data set, in memory
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
            f"{place} is in use by another process; wait for its end, stop it{_holder(lock)}, or "
            f"{remedy}"
        ) from None
    try:
        yield
    finally:
        # Removed while held: a process that opened this file before finds it gone, and makes
        # another.
        lock.unlink(missing_ok=True)
        held.release()


def _holder(lock: Path) -> str:
    """Who holds a lock, in brackets; "" where the system does not tell."""
    with suppress(OSError, psutil.Error):
        inode = f":{lock.stat().st_ino} "
        for line in Path("/proc/locks").read_text().splitlines():
            if "FLOCK" in line and inode in line and "->" not in line:
                number = int(line.split()[4])
                command = " ".join(psutil.Process(number).cmdline()).split()
                return printable(f" (process {number}: {' '.join(command)[:80]})")
    return ""


@contextmanager
def tidied(*folders: Path) -> Iterator[None]:
    """Remove at the end of the block those folders that it made and left empty, in this order."""
    made = [folder for folder in folders if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # it holds something, or was not made
                folder.rmdir()


def require_folder(output: Path) -> None:
    """Raise a UsageError for an output folder that is a file."""
    if output.is_file():
        raise UsageError(f"{output} is a file; --output names a folder, use another")


def require_new(output: Path) -> None:
    """Raise a UsageError for an output that exists."""
    if output.exists():
        raise UsageError(f"--output {str(output)!r} exists; name another, or remove it first")


def require_absent(output: Path, names: Iterable[str]) -> None:
    """Raise a UsageError for an output folder that has one of the files to make, or is a file."""
    require_folder(output)
    for path in (output / name for name in names):
        if path.exists():
            raise UsageError(f"{path} exists; use another --output")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold what a command is to make, from its first look at it to its end.

    Of two of the same command one works; the other would have worked for nothing, or replaced what
    the first one made. The block may use `whole_folder` or `sibling_lock`, which are other locks.

    Raises:
        UsageError: another process holds it, or it is a link to nothing.
    """
    path = output.resolve()
    if output.is_symlink() and not path.exists():
        raise UsageError(f"{output} is a link to nothing; make {path}, or name another output")
    claim = path.with_name(f".{path.name}.claim")
    with tidied(*path.parents), locked(output, "name another output", claim):
        yield


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


def portable(name: str) -> str:
    """A path without what it says of this machine; a name that is no path, such as a hub id, as is.

    Below the working folder it becomes relative to that; elsewhere its last name stays.
    """
    path = Path(name).expanduser()
    if not path.is_absolute() and ".." not in path.parts:
        return name
    for full in (Path(os.path.abspath(path)), path.resolve()):
        if full.is_relative_to(Path.cwd()):
            return str(full.relative_to(Path.cwd()))
    return full.name


def portable_word(word: str) -> str:
    """`portable` of a word of a command line, which may be --FLAG=PATH."""
    flag, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return f"{flag}{equals}{portable(value)}"


def names_in(folder: Path) -> set[str]:
    """What a folder holds besides its lock and what a kill left of a write; nothing without one."""
    left = {LOCK_FILE, *(path.name for path in folder.glob(TEMPORARIES))}
    return {path.name for path in folder.glob("*")} - left


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
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        try:
            yield temporary
            _settle_tree(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        fsync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _settle_tree(folder: Path) -> None:
    """Put all files on the disk, and let those read them who may read their folder.

    A library that writes for the owner alone, as safetensors does, would leave an adapter that
    nobody else can load.
    """
    for parent, _, names in os.walk(folder):
        readers = os.stat(parent).st_mode & 0o444
        for name in names:
            path = Path(parent, name)
            if path.is_symlink():  # what it leads to is not of this folder
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode | readers != mode:
                with suppress(OSError):  # not every file system has modes
                    path.chmod(mode | readers)
        fsync_folder(parent)


def save_dataset(
    target: str | os.PathLike,
    splits: Mapping[str, Iterable[dict]],
    columns: list[str],
    preparation: dict,
) -> None:
    """Save `columns` of the rows of each split as a `DatasetDict`, whole or not at all.

    Args:
        target: the folder to make; one that exists is replaced.
        splits: rows by split, none of them empty; read once, a block at a time.
        preparation: how the rows were made, kept next to them as `PREPARATION_FILE`.
    """
    from datasets import DatasetDict, disable_progress_bars

    disable_progress_bars()
    with whole_folder(target) as folder:
        files = {name: folder / f"{name}.arrow" for name in splits}
        DatasetDict(
            {name: _write_table(files[name], rows, columns) for name, rows in splits.items()}
        ).save_to_disk(folder)
        for name, file in files.items():
            (saved,) = (folder / name).glob("*.arrow")
            file.replace(saved)
        write_json(folder / PREPARATION_FILE, preparation)


def _write_table(file: Path, rows: Iterable[dict], columns: list[str]) -> "Dataset":
    """Write rows as a saved data set has them; returns the first of them, under the hash of all."""
    import pyarrow
    from datasets import Dataset

    left = iter(rows)

    def block(schema: pyarrow.Schema | None = None) -> pyarrow.Table:
        some = list(islice(left, ROWS_AT_ONCE))
        values = {column: [row[column] for row in some] for column in columns}
        return pyarrow.table(values, schema)

    first = block()
    head = Dataset(first.slice(0, 1))
    schema = head.data.schema
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while len(first):
            writer.write_table(first.cast(schema))
            first = block(schema)
    return Dataset(head.data.table, fingerprint=sha256_of(file)[:16])
