"""Files that survive a kill at any moment, and text files that people bring.

The first are written atomically, or hold JSON lines that are only ever appended.
"""

import codecs
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from utils.cli import UsageError


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What `write_atomic` fills before it replaces a file, and a kill leaves.
TEMPORARIES = ".*.tmp-*"


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; an empty one where it is not there, or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def required_object(path: str | os.PathLike, remedy: str, *needed: str) -> dict[str, Any]:
    """The object in a JSON file that has to hold one.

    Args:
        remedy: what the user can do, such as "restore the model's own".
        needed: entries that it has to have.

    Raises:
        UsageError: it does not.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object; {remedy}")
    for name in needed:
        if name not in value:
            raise UsageError(f"{path} has no {name!r}; {remedy}")
    return value


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of(paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its path as it was given."""
    return {str(path): sha256_of(path) for path in paths}


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def require_fetched(folder: Path) -> None:
    """Refuse a folder with a file that git-lfs has not fetched: a few lines in its place.

    Raises:
        UsageError: names the file.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise UsageError(
                        f"{path} is a git-lfs pointer and not the file itself; run git lfs pull "
                        "where it came from"
                    )


def read_jsonl(path: str | os.PathLike) -> Iterator[dict]:
    """Yield the records of a JSON-lines file; a torn last line (no newline) is passed over.

    Raises:
        UsageError: a complete line is not a JSON object; the line's number is named.
    """
    return (record for _, record in placed_records(path))


def placed_records(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """`read_jsonl`, each record after its place in the file, in bytes, for `record_at`."""
    place = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise UsageError(f"{path}, line {number} is not a JSON object")
            yield place, record
            place += len(line)


def record_at(file: BinaryIO, place: int) -> dict:
    """The record at a place that `placed_records` gave."""
    file.seek(place)
    return json.loads(file.readline())


def json_lines(records: Iterable[dict]) -> str:
    """`records` as JSON, one line each."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class JsonlAppender:
    """An append-only JSON-lines file; a torn last line left by a kill is cut off on opening."""

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would try again later to write what the disk did not take.
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(_length_of_complete_lines(self._file))
        fsync_folder(path.parent)

    def append(self, records: Iterable[dict]) -> None:
        """Write `records`, one line each; when this returns they are on the disk.

        Raises:
            OSError: the disk does not take them; none of them is in the file then.
        """
        left, end = memoryview(json_lines(records).encode()), self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonlAppender":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _length_of_complete_lines(file, block: int = 1 << 16) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def open_text(
    path: str | os.PathLike, *, newline: str | None = None, errors: str = "strict"
) -> TextIO:
    """Open a UTF-8 file from any editor: a byte-order mark is taken off, `.gz` is unpacked.

    Args:
        newline, errors: see `open`.

    Raises:
        UsageError: the file is UTF-16 or UTF-32, which a mark or a zero byte at its start shows.
    """
    opener = gzip.open if Path(path).suffix == ".gz" else open
    with opener(path, "rb") as file:
        start = cast(bytes, file.read(4))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in start:
        raise UsageError(
            f"{str(path)!r} cannot be read: it is UTF-16 or UTF-32, not UTF-8; save it as UTF-8, "
            "such as with: iconv -f UTF-16 -t UTF-8"
        )
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline=newline, errors=errors))
