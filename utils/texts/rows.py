"""The one reader of users' files: from every form that people have to rows. No torch.

A row is an object (JSON), a row of a table (parquet, saved data sets), or a lone text (a member of
a JSON list, a line or block of a text file, a pickled string), which counts as an `instruction`.
Rows are read one after another, and of tables the needed columns alone, so that a file may be
larger than memory and nothing depends on columns that nobody asked for.
"""

import csv
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from utils.cli import UsageError, in_one_line, say
from utils.files import open_text
from utils.folders import PREPARATION_FILE
from utils.texts.pickles import read_pickled_strings
from utils.texts.prompts import BEGIN, read_instruction_file

if TYPE_CHECKING:
    from _csv import Reader

    import pyarrow

# The files of a data set.
FILE_SUFFIXES = (
    ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".json.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz",
)  # fmt: skip
FORMATS = (
    ".json, .jsonl, .csv, .tsv or .txt (.gz too), .pkl, .parquet, a saved datasets folder, a "
    "folder of shard-*.jsonl"
)
# What names such files in a folder that `datasets` saved, or describes it.
DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", PREPARATION_FILE}
# One of several files of a split, as on the hub.
_NUMBERED = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
# Columns that hold the turns of a conversation, and a part of Alpaca's or Dolly's instructions.
TURNS, PARTS = ("messages", "conversation", "conversations"), ("input", "context")
# Append-only files of `inference.py`, whose last line a kill may have torn.
SHARDS = "shard-*.jsonl"
# In place of a suffix: a text file is one row.
WHOLE_TEXT = "whole text"
JSON_BLOCK, LONGEST_ROW = 1 << 20, 1 << 26  # characters
# Names of columns that a message shows.
MOST_NAMES = 20
TABLE_BLOCK = 1000  # rows
LFS_POINTER = b"version https://git-lfs"


class MissingColumn(UsageError):
    """A row lacks a wanted column.

    Attributes:
        column: the one that is wanted.
        names: those that are there.
    """

    def __init__(self, message: str, column: str, names: list[str]):
        super().__init__(message)
        self.column, self.names = column, names


def read_rows(
    files: Iterable[Path], columns: Mapping[str, Collection[str]]
) -> Iterator[dict[str, str]]:
    """Yield the texts in `columns` of every row of `files`.

    Args:
        columns: wanted columns, and the names that each may have in the files, the preferred first.

    Raises:
        UsageError: see `raw_rows` and `pick`.
    """
    names = [name for alternatives in columns.values() for name in alternatives]
    for file in files:
        for number, value in enumerate(raw_rows(file, names), start=1):
            yield pick(file, number, value, columns)


def read_table(files: Iterable[Path], columns: Mapping[str, Collection[str]]) -> "pyarrow.Table":
    """The rows of `read_rows` as a table of strings in memory."""
    import pyarrow

    schema = pyarrow.schema([(column, pyarrow.string()) for column in columns])
    rows, blocks = read_rows(files, columns), [schema.empty_table()]
    while block := list(islice(rows, TABLE_BLOCK)):
        blocks.append(pyarrow.Table.from_pylist(block, schema))
    return pyarrow.concat_tables(blocks)


def count_rows(files: Iterable[Path], columns: Mapping[str, Collection[str]]) -> int:
    """How many rows `read_rows` yields: of tables from their metadata, of other files by reading.

    Raises:
        UsageError: see `read_rows`; of a table the first row alone is looked at.
    """
    total = 0
    for file in files:
        rows = read_rows([file], columns)
        if form_of(file) == ".parquet":
            next(rows, None)
            import pyarrow.parquet

            total += pyarrow.parquet.read_metadata(file).num_rows
        elif form_of(file) == ".arrow":
            next(rows, None)
            total += sum(batch.num_rows for batch in _arrow_batches(file))
        else:
            total += sum(1 for _ in rows)
    return total


def raw_rows(file: Path, names: Collection[str] = (), form: str | None = None) -> Iterator[object]:
    """Yield what stands in one file, entry by entry: objects as dicts, texts as strings.

    Args:
        names: the columns to read of a table; of those, the ones that it lacks are left out.
        form: the suffix that tells how to read the file; its own by default.

    Raises:
        UsageError: the file cannot be read as what its suffix says; names the line or the entry.
    """
    with _explained(file):
        yield from _READERS[form or form_of(file)](file, names)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Say of which file a reader complains."""
    try:
        with open(file, "rb") as start:
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError("it is a pointer of Git LFS; get the file itself by: git lfs pull")
        yield
    except UsageError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UsageError(f"{str(file)!r} cannot be read: {in_one_line(error, 300)}") from None


def pick(
    file: Path, number: int, value: object, columns: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """The texts in `columns` of an entry of `raw_rows`.

    Args:
        number: of the entry in its file, from 1; blank lines are no entries.
        columns: see `read_rows`.

    Raises:
        MissingColumn: none of a column's names is there.
        UsageError: the entry is neither a text nor an object, or a value is not a valid text.
    """
    row, texts = row_of(value, f"{file}, entry {number}"), {}
    for column, alternatives in columns.items():
        name = next((name for name in alternatives if name in row), None)
        if name is None:
            present = names_of_table(file) or [str(name) for name in row]
            raise MissingColumn(
                f"{file}, entry {number} has no column {' or '.join(map(repr, alternatives))}, "
                f"only {listed(present)}",
                column,
                present,
            )
        texts[column] = text_of(row[name], f"{file}, entry {number}, column {name!r}")
    return texts


def listed(names: Iterable[str]) -> str:
    """Names of columns for a message; of a table without a header they are a private row."""
    names = [str(name) for name in names]
    shown = [name if len(name) <= 40 else name[:40] + "..." for name in names[:MOST_NAMES]]
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    is_row = any(len(name) > 40 or len(name.split()) > 3 for name in names)
    hint = " (does the first line of the file name the columns?)" if is_row else ""
    return (", ".join(shown) or "texts") + hint


def row_of(value: object, place: str) -> dict:
    """An entry of `raw_rows` as an object; a lone text is its `instruction`.

    Raises:
        UsageError: it is something else.
    """
    row = {"instruction": value} if isinstance(value, str) else value
    if not isinstance(row, dict):
        kind = type(value).__name__
        raise UsageError(f"{place} is neither a text nor an object but of type {kind}")
    return row


def text_of(value: object, place: str) -> str:
    """A value that is a text which can be saved.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(value, str):
        raise UsageError(f"{place} is of type {type(value).__name__}, not text")
    if not _is_unicode(value):
        raise UsageError(
            f"{place} is not valid Unicode: it has half a surrogate pair; correct it, or leave the "
            "row out"
        )
    return value


def form_of(file: Path) -> str:
    """The suffix that tells how to read a file, which may be packed by gzip."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def is_readable(file: Path) -> bool:
    """Whether a file has the suffix of a known form."""
    return form_of(file) in _READERS


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder.

    A split was saved by `datasets`, or is a file NAME with a data set's suffix, or is files such as
    NAME-00000-of-00002, there or one folder below, as in data sets of the hub.

    Raises:
        UsageError: see `saved_files`.
    """
    files: dict[str, list[Path]] = {}
    for suffix in reversed(FILE_SUFFIXES):
        found: dict[str, list[Path]] = {}
        for file in sorted((*folder.glob(f"*{suffix}"), *folder.glob(f"*/*-of-*{suffix}"))):
            if file.name not in DESCRIPTIONS and not file.name.startswith("."):
                name = _NUMBERED.sub("", file.name.removesuffix(suffix))
                found.setdefault(name, []).append(file)
        files |= found
    states = sorted(folder.glob("*/state.json"))
    return files | {state.parent.name: saved_files(state.parent) for state in states}


def saved_files(folder: Path) -> list[Path]:
    """The files of a data set, or of one split of it, that `datasets` saved.

    Raises:
        UsageError: its `state.json` does not name them.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{str(folder)!r} cannot be read: state.json is damaged: {error}"
        ) from None


def names_of(file: Path) -> list[str]:
    """Every column of a table, or the names in the first object of another file."""
    first = None if form_of(file) in _TABLES else next(raw_rows(file), None)
    return names_of_table(file) or (list(first) if isinstance(first, dict) else [])


@cache
def say_unread_parts(file: Path) -> None:
    """Say it once if a file has a part of its instructions in a column that is not read."""
    if form_of(file) in (".txt", ".pkl") or os.environ.get("RANK", "0") != "0":
        return
    names = names_of(file)
    if unread := [name for name in PARTS if "instruction" in names and name in names]:
        say(
            f"{file}: the column {unread[0]!r} is not read; python -m data.prepare_instructions "
            "joins it to the instruction"
        )


def names_of_table(file: Path) -> list[str]:
    """Every column of a table; none for other files."""
    with _explained(file):
        if form_of(file) in _DELIMITERS:
            with _opened(file, newline="") as stream:
                return _header(file, stream)[1]
        if form_of(file) == ".parquet":
            import pyarrow.parquet

            return _distinct(pyarrow.parquet.read_schema(file).names)
        if form_of(file) == ".arrow":
            import pyarrow

            with pyarrow.memory_map(str(file)) as source:
                return _distinct(pyarrow.ipc.open_stream(source).schema.names)
        return []


def _distinct(names: list[str]) -> list[str]:
    """Names of columns as they are, if none stands twice."""
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"two columns have the name {twice[:40]!r}; rename one")
    return names


def _parquet_rows(file: Path, names: Collection[str]) -> Iterator[object]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in _distinct(table.schema_arrow.names) if name in names]
    for batch in table.iter_batches(TABLE_BLOCK, columns=columns):
        yield from batch.to_pylist()


def _arrow_rows(file: Path, names: Collection[str]) -> Iterator[object]:
    for batch in _arrow_batches(file):
        part = batch.select([name for name in _distinct(batch.schema.names) if name in names])
        for start in range(0, batch.num_rows, TABLE_BLOCK):
            yield from part.slice(start, TABLE_BLOCK).to_pylist()


def _arrow_batches(file: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        yield from pyarrow.ipc.open_stream(source)


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file to read; a ValueError names the line of bytes that are not UTF-8."""
    try:
        with open_text(file, newline=newline) as stream:
            yield stream
    except UnicodeDecodeError:
        with open_text(file, newline=newline, errors="surrogateescape") as stream:
            number = next(n for n, line in enumerate(stream, start=1) if not _is_unicode(line))
        raise ValueError(f"line {number} is not UTF-8; save the file as UTF-8") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# The separator of fields, where the header does not show another.
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TABLES = (*_DELIMITERS, ".parquet", ".arrow")


def _csv_rows(file: Path, names: Collection[str]) -> Iterator[object]:
    """The rows of a table of texts in a file, whose first line names the columns."""
    with _opened(file, newline="") as stream:
        reader, header = _header(file, stream)
        wanted = [(place, name) for place, name in enumerate(header) if name in names]
        begun = reader.line_num
        try:
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise csv.Error(f"it has {len(fields)} fields, and the header {len(header)}")
                if fields:
                    yield {name: fields[place] for place, name in wanted}
                begun = reader.line_num
        except csv.Error as error:
            raise ValueError(
                f"line {begun + 1} cannot be read as a row: {error}; put double quotes round a "
                "text that has separators, quotes or line breaks, and double the quotes inside"
            ) from None


def _header(file: Path, stream: TextIO) -> tuple["Reader", list[str]]:
    """A reader that stands after the line with the names of the columns, and these names."""
    csv.field_size_limit(LONGEST_ROW)
    first = stream.readline()
    # Spreadsheets in countries with a decimal comma write semicolons, or say what they write.
    if stated := re.fullmatch(r"sep=(.)\s*", first):
        delimiter = stated[1]
    else:
        stream.seek(0)
        others = ";\t" if form_of(file) == ".csv" else ""
        bare = re.sub(r'"[^"]*"', "", first)
        delimiter = max(_DELIMITERS[form_of(file)] + others, key=bare.count)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header = next((fields for fields in reader if any(fields)), [])
    except csv.Error as error:
        raise ValueError(f"line 1 cannot be read as names of columns: {error}") from None
    header = [name.strip() for name in header]
    if not header:
        raise ValueError("it has no first line with the names of the columns")
    return reader, _distinct(header)


def _whole_text(file: Path, _: Collection[str]) -> Iterator[object]:
    with _opened(file) as stream:
        yield stream.read()


def _text_rows(file: Path, _: Collection[str]) -> Iterator[object]:
    with _opened(file) as stream:
        if stream.read(len(BEGIN)) == BEGIN:
            yield from (block.text for block in read_instruction_file(file))
            return
        stream.seek(0)
        yield from (line.removesuffix("\n") for line in stream if not line.isspace())


def _json_rows(file: Path, _: Collection[str], *, may_be_one_object: bool) -> Iterator[object]:
    """The members of a JSON list or the objects of JSON lines, whichever the file holds."""
    with _opened(file, newline="\n") as stream:
        first = next((c for c in iter(partial(stream.read, 1), "") if not c.isspace()), "")
        if first == "[":
            yield from _list_members(stream)
            return
        stream.seek(0)
        lines = ((n, line) for n, line in enumerate(stream, start=1) if not line.isspace())
        head = list(islice(lines, 2))
        may_be_one_value = len(head) < 2 or not _is_json(head[0][1])
        if not may_be_one_object and may_be_one_value and (table := _table_by_columns(file)):
            yield from table
            return
        for number, line in chain(head, lines):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                if file.match(SHARDS) and not line.endswith("\n"):
                    return
                reason = _why_not_json(line, error)
                raise ValueError(f"line {number} is not a JSON object: {reason}") from None


def _why_not_json(line: str, error: Exception) -> str:
    if line.rstrip().endswith(",") and _is_json(line.rstrip()[:-1]):
        return "it ends with a comma; remove the comma at the end of every line"
    if not line.endswith("\n"):
        return "the file ends in it; get the file again, or remove its last line"
    return getattr(error, "msg", str(error))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _table_by_columns(file: Path) -> list[dict] | None:
    """The rows of the one JSON value that a file is, if it is a table by columns.

    Returns:
        None if the file is not one value.

    Raises:
        ValueError: it is another value; says how to make a list of it.
    """
    with open_text(file) as stream:
        text = stream.read()
    try:
        value = json.loads(text if text.strip() else "null")
    except ValueError:
        return None
    columns = value if isinstance(value, dict) else {}
    if columns and all(_is_column_of_pandas(column) for column in columns.values()):
        columns = {name: list(column.values()) for name, column in columns.items()}
    lists = {name: column for name, column in columns.items() if isinstance(column, list)}
    holds_objects = any(isinstance(member, dict) for column in lists.values() for member in column)
    same_length = len({len(column) for column in lists.values()}) == 1
    if len(lists) == len(columns) and same_length and not holds_objects:
        return [dict(zip(lists, members)) for members in zip(*lists.values())]
    fix = "put [ before and ] after it"
    if len(lists) == 1 and not lists.keys() & TURNS:  # else its lists are parts of a row
        fix = f"save what stands under {next(iter(lists))!r} alone"
    raise ValueError(
        f"it must hold a list of texts or of objects as JSON, or an object a line; {fix}"
    )


def _is_column_of_pandas(column: object) -> bool:
    return isinstance(column, dict) and bool(column) and all(name.isdigit() for name in column)


# Between two members of a list: a comma; and where no member follows, the closing bracket.
_GAP = re.compile(r"\s*(,?)\s*(\]?)")


def _list_members(stream: TextIO) -> Iterator[object]:
    """Yield the members of a JSON list, whose opening bracket is read, without holding it whole."""
    decoder, number = json.JSONDecoder(), 1
    buffer, position = stream.read(JSON_BLOCK), 0
    while True:
        gap = _GAP.match(buffer, position)
        assert gap  # it matches nothing, too
        comma, end = gap.groups()
        if end and comma:
            raise ValueError(f"a comma stands after the last entry, {number - 1}; remove it")
        if end:
            if (buffer[gap.end() :] + stream.read(JSON_BLOCK)).strip():
                raise ValueError("more stands after the end of its list; leave one list in a file")
            return
        problem = None
        try:
            if bool(comma) != (number > 1):
                raise ValueError("a comma before it, or the end of the list, is missing")
            member, after = decoder.raw_decode(buffer, gap.end())
        except ValueError as error:
            problem, after = getattr(error, "msg", str(error)), len(buffer)
        may_go_on = after == len(buffer) and after - position <= LONGEST_ROW
        if may_go_on and (block := stream.read(JSON_BLOCK)):
            buffer, position = buffer[position:] + block, 0
            continue
        if problem:
            raise ValueError(f"entry {number} cannot be read as JSON: {problem}")
        yield member
        number, position = number + 1, after


_READERS: dict[str, Callable[[Path, Collection[str]], Iterator[object]]] = {
    ".json": partial(_json_rows, may_be_one_object=False),
    ".jsonl": partial(_json_rows, may_be_one_object=True),
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".txt": _text_rows,
    WHOLE_TEXT: _whole_text,
    ".pkl": lambda file, _: iter(read_pickled_strings(file.read_bytes())),
}
