"""Instructions from the files that people have: lists, lines, blocks, tables and shards."""

import json
import pickletools
from collections.abc import Iterable
from pathlib import Path

from utils.cli import UsageError, say
from utils.files import read_jsonl
from utils.texts.prompts import BEGIN, read_instruction_file

FORMATS = ".pkl, .json, .jsonl, .txt, .parquet, a saved datasets folder, a folder of shard-*.jsonl"
# The finish_reason of a sampled text that has an end.
_FINISHED = "stop"


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
    if len(texts) < len(entries):
        say(
            f"{len(entries) - len(texts):,} sampled texts left out: their finish_reason is not "
            f"{_FINISHED!r}"
        )
    if not texts:
        raise UsageError(f"{path!r} holds no instruction")
    return texts


def read_entries(path: str, split: str | None = None) -> list[str | None]:
    """Read every entry of `path`, in its order.

    Args:
        path: a file or folder in one of `FORMATS`. Objects (json, jsonl) and columns (parquet,
            datasets) give their `instruction`, or else their `text`.
        split: which split of a saved `DatasetDict`; unused otherwise.

    Returns:
        Texts; None for a sampled one (an object with a `finish_reason`) that was cut before its
        end.

    Raises:
        UsageError: no such path, an unknown format, or content that is not instructions.
    """
    source = Path(path)
    if not source.exists():
        raise UsageError(f"{path!r} does not exist")
    if source.is_dir():
        entries = _read_folder(source, split)
    elif source.suffix in _READERS:
        try:
            entries = _READERS[source.suffix](source)
        except UsageError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path!r} cannot be read: {error}") from None
    else:
        raise UsageError(f"{path!r} has an unknown format; known are {FORMATS}")
    for number, text in enumerate(entries, start=1):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise UsageError(f"{path}, instruction {number} is not valid Unicode") from None
    return entries


def read_pickled_strings(data: bytes) -> list[str]:
    """Read a pickled list of strings without ever running a pickle.

    A pickle is a program, and `pickle.load` runs it. Here only the dozen opcodes that build lists
    and strings are understood; everything that could name a class, call it, or ask for memory
    that the file does not itself hold is unknown.

    Raises:
        UsageError: anything but a list of strings.
    """
    stack, memo, marks = [], {}, []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "EMPTY_LIST":
                    stack.append([])
                case "MARK":
                    marks.append(len(stack))
                case "LIST":
                    start = marks.pop()
                    stack[start:] = [stack[start:]]
                case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    start = marks.pop()
                    stack[start - 1].extend(stack[start:])
                    del stack[start:]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "STOP":
                    break
                case name:
                    raise UsageError(
                        "a .pkl may hold a list of strings and nothing else; this one has the "
                        f"opcode {name}. Save it as .json instead"
                    )
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the .pkl is damaged: {error}") from None
    if len(stack) != 1 or not isinstance(stack[0], list):
        raise UsageError("a .pkl must hold one list of strings")
    return _texts(stack[0])


def _read_folder(folder: Path, split: str | None) -> list[str]:
    shards = sorted(folder.glob("shard-*.jsonl"))
    if shards:
        return [text for shard in shards for text in _texts(read_jsonl(shard), f"{shard}, ")]
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except FileNotFoundError:
        raise UsageError(
            f"{str(folder)!r} is neither a saved datasets folder nor a folder of shard-*.jsonl"
        ) from None
    if isinstance(dataset, DatasetDict):
        if split is None or split not in dataset:
            raise UsageError(f"--split {split!r}: {str(folder)!r} has {', '.join(dataset)}")
        dataset = dataset[split]
    return _column(folder, dataset.column_names, lambda name: dataset[name])


def _read_parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    return _column(path, file.schema_arrow.names, lambda name: file.read([name])[name].to_pylist())


def _read_txt(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if text.startswith(BEGIN):
        return [block.text for block in read_instruction_file(path)]
    # Not splitlines(): form feeds and Unicode line separators belong to their instruction.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _read_json(path: Path) -> list[str]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, list):
        raise UsageError(f"{path} must hold a list of strings or of objects")
    return _texts(value)


def _column(path: Path, names: Iterable[str], read) -> list[str]:
    for name in ("instruction", "text"):
        if name in names:
            return [_string(number, text) for number, text in enumerate(read(name), start=1)]
    raise UsageError(f"{path} has no column 'instruction' or 'text', only {', '.join(names)}")


def _texts(items: Iterable, where: str = "") -> list[str | None]:
    """The strings of `items`, or of its objects; None for those that were cut while sampled."""
    texts = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            if item.get("finish_reason", _FINISHED) != _FINISHED:
                texts.append(None)
                continue
            item = item.get("instruction", item.get("text"))
        texts.append(_string(number, item, where))
    return texts


def _string(number: int, item: object, where: str = "") -> str:
    if not isinstance(item, str):
        raise UsageError(
            f"{where}entry {number} is no string and has no string 'instruction' or 'text' but is "
            f"of type {type(item).__name__}"
        )
    return item


_READERS = {
    ".pkl": lambda path: read_pickled_strings(path.read_bytes()),
    ".json": _read_json,
    ".jsonl": lambda path: _texts(read_jsonl(path), f"{path}, "),
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
