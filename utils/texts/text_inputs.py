"""Instructions from the files that people have, and from sampling shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.cli import UsageError, say
from utils.texts.rows import (
    FORMATS,
    SHARDS,
    is_readable,
    pick,
    raw_rows,
    saved_files,
    say_unread_parts,
    split_files,
)

# The preferred name first.
COLUMNS = {"instruction": ("instruction", "text")}
# The finish_reason of a sampled text that has an end.
FINISHED = "stop"


class Origin(NamedTuple):
    """The sample that a text was: its number, and the path of its shard; None where unknown."""

    sample_id: int | None = None
    shard: str | None = None


def read_instructions(path: str, split: str | None = None) -> list[str]:
    """Read the instructions of `path`, in its order, repeated and blank ones included.

    Sampled texts that were cut before their end are left out, and their number is said.

    Args:
        path, split: see `read_entries`.

    Raises:
        UsageError: see `read_entries`; or nothing is left.
    """
    entries = read_entries(path, split)
    texts = [text for text in entries if text is not None]
    say_cut(len(entries) - len(texts))
    if not texts:
        raise UsageError(f"{path!r} holds no instruction")
    return texts


def say_cut(count: int) -> None:
    """Tell how many sampled texts are left out, since they were cut before their end."""
    if count:
        say(f"{count:,} sampled texts left out: their finish_reason is not {FINISHED!r}")


def read_entries(path: str, split: str | None = None) -> list[str | None]:
    """Read every entry of `path` into memory, see `entries_of`."""
    return list(entries_of(path, split))


def entries_of(path: str, split: str | None = None) -> Iterator[str | None]:
    """Yield every entry of `path`, in its order.

    Args:
        path: a file or folder in one of `FORMATS`. Objects and the columns of tables give their
            `instruction`, or else their `text`.
        split: which split of a folder that holds several; unused otherwise.

    Yields:
        Texts; None for a sampled one (with a `finish_reason`) that was cut before its end.

    Raises:
        UsageError: no such path, an unknown format, or content that is not instructions.
    """
    names = [*COLUMNS["instruction"], "finish_reason"]
    for file in files_of(path, split):
        say_unread_parts(file)
        for number, row in enumerate(raw_rows(file, names), start=1):
            yield None if _is_cut(row) else pick(file, number, row, COLUMNS)["instruction"]


def read_column(path: str, split: str | None, column: str) -> list[object]:
    """What a column holds of each of the texts that `read_instructions` reads, in its order.

    Raises:
        UsageError: see `read_entries`; or an entry has no such column.
    """
    values = []
    for file in files_of(path, split):
        for number, row in enumerate(raw_rows(file, [column, "finish_reason"]), start=1):
            if not isinstance(row, dict) or column not in row:
                raise UsageError(f"{file}, entry {number} has no column {column!r}")
            if not _is_cut(row):
                values.append(row[column])
    return values


def origins(path: str, split: str | None, *, cut: bool) -> list[Origin]:
    """The sample that each text of `path` was, in its order.

    Args:
        path, split: see `read_entries`. Samples, and what `extract` made of them, know theirs.
        cut: whether texts that were cut before their end have a place, as they have among the
            entries; those of `read_instructions` have none.
    """
    names = [*COLUMNS["instruction"], "finish_reason", "id", "sample_id", "shard"]
    return [
        _origin(row, file)
        for file in files_of(path, split)
        for row in raw_rows(file, names)
        if cut or not _is_cut(row)
    ]


def _origin(row: object, file: Path) -> Origin:
    if not isinstance(row, dict):
        return Origin()
    sampled = "finish_reason" in row
    number, shard = row.get("id" if sampled else "sample_id"), row.get("shard")
    # Foreign rows may hold anything under these names.
    known = shard if isinstance(shard, str) else None
    return Origin(number if isinstance(number, int) else None, str(file) if sampled else known)


def _is_cut(row: object) -> bool:
    return isinstance(row, dict) and row.get("finish_reason", FINISHED) != FINISHED


def files_of(path: str, split: str | None = None) -> list[Path]:
    """The files that `read_entries` reads, in its order; see there."""
    source = Path(path)
    if not source.exists():
        raise UsageError(f"{str(source)!r} does not exist")
    if not source.is_dir():
        if not is_readable(source):
            raise UsageError(f"{str(source)!r} has an unknown format; known are {FORMATS}")
        return [source]
    if shards := sorted(source.glob(SHARDS)):
        return shards
    if (source / "state.json").is_file():
        return saved_files(source)
    splits = split_files(source)
    if not splits:
        raise UsageError(
            f"{str(source)!r} is neither a saved datasets folder nor a folder of {SHARDS}"
        )
    if split not in splits:
        raise UsageError(f"--split {split!r}: {str(source)!r} has {', '.join(splits)}")
    return splits[split]
