"""Data sets: find them, count their rows, load their splits. No torch."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UsageError, in_one_line
from utils.texts.prompts import TOPIC, columns_of
from utils.texts.rows import (
    FILE_SUFFIXES,
    MissingColumn,
    count_rows,
    listed,
    read_table,
    say_unread_parts,
    split_files,
)

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER = Path("data")
VALIDATION_NAMES = ("val", "validation")


def is_labelled(dataset_name: str) -> bool:
    """Whether a data set holds (instruction, answer) pairs: its name starts with `labelled`."""
    return Path(dataset_name).name.startswith("labelled")


def find_dataset(dataset_name: str) -> Path | None:
    """The folder or file of a data set: `data/NAME`, then NAME as a path; None for a hub id."""
    for base in (DATA_FOLDER / dataset_name, Path(dataset_name).expanduser()):
        for candidate in (base, *(base.with_name(base.name + s) for s in FILE_SUFFIXES)):
            is_data_folder = candidate.is_dir() and any(candidate.iterdir())
            if is_data_folder or (candidate.is_file() and candidate.name.endswith(FILE_SUFFIXES)):
                return candidate
    return None


def tried_places(dataset_name: str) -> str:
    """Where `find_dataset` looked and how data sets are made, for an error message."""
    return (
        f"no data set {dataset_name!r}: tried {DATA_FOLDER / dataset_name} and {dataset_name} "
        f"(a saved DatasetDict, or {', '.join(FILE_SUFFIXES)}), then the hub; "
        "data/prepare_instructions.py makes one of your own files, data/prepare_quickstart.py and "
        "data/prepare_chatbot_arena.py make known ones"
    )


def download_files(hub_id: str) -> Path:
    """The folder with the data files of a data set of the hub, downloaded where it is not here.

    Raises:
        UsageError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in FILE_SUFFIXES]
    try:
        # The token comes from HF_TOKEN, which the library reads by itself.
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:
        reason = in_one_line(error, 120)
        raise UsageError(
            f"no --input {hub_id!r} here, and the hub does not give it ({reason}); for a gated "
            f"data set accept the licence at https://huggingface.co/datasets/{hub_id} and set "
            "HF_TOKEN, or name a local file"
        ) from None


def rows_fingerprint(texts: Iterable[str]) -> str:
    """A SHA-256 of rows in their order, by which runs and histograms of one data set are known.

    Every text goes in behind its length in bytes (8 bytes, little-endian), so that no other rows
    run together to the same bytes. It tells who guesses the rows that the guess is right: of
    private ones it is for `private/` alone.

    Args:
        texts: read once, so that they need not lie in memory.
    """
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def count_train_examples(dataset_name: str, style: str | None = None) -> int | None:
    """Rows of the train split; None if it is not here.

    Tables are counted from their metadata, other files by reading them.

    Args:
        style: see `load_split`.

    Raises:
        UsageError: the data set is here, but `load_splits` would refuse it.
    """
    path = find_dataset(dataset_name)
    if path is None:
        return None
    files = _split_files(path, ("train",))
    with _explained(dataset_name, "train"):
        count = count_rows(files, _columns(dataset_name, style))
        say_unread_parts(files[0])
    if count == 0:
        raise UsageError(f"data set {str(path)!r} has no example in its train split")
    return count


def train_files(dataset_name: str) -> list[Path]:
    """The files of the train split of a data set that is here.

    Raises:
        UsageError: it is not here, or has no train split.
    """
    path = find_dataset(dataset_name)
    if path is None:
        raise UsageError(tried_places(dataset_name))
    return _split_files(path, ("train",))


def load_splits(dataset_name: str, style: str | None = None) -> dict[str, "Dataset"]:
    """Load the `train` split and, where there is one, the validation split as `val`.

    Args:
        style: see `load_split`.

    Returns:
        The columns that are asked for. Those of files that are here lie in memory, and no copy of
        them is left in a cache.

    Raises:
        UsageError: not found, empty, or a row without the columns that are asked for.
    """
    path = find_dataset(dataset_name)
    if path is None:
        splits = _load_from_hub(dataset_name, style)
    else:
        names = {"train": ("train",), "val": VALIDATION_NAMES}
        found = {split: _read_split(dataset_name, style, path, names[split]) for split in names}
        splits = {split: rows for split, rows in found.items() if rows is not None}
    if len(splits["train"]) == 0:
        raise UsageError(f"data set {dataset_name!r} has no example in its train split")
    return splits


def load_split(dataset_name: str, split: str, style: str | None = None) -> "Dataset":
    """Load one split of a data set that is here, or all rows of a lone file.

    Args:
        style: the prompt style whose columns are asked for; if None, those of the data set's name.

    Raises:
        UsageError: not here, no such split, empty, or a row without the columns that are asked for.
    """
    path = find_dataset(dataset_name)
    if path is None:
        raise UsageError(f"no data set {dataset_name!r} here; make it, or give its path")
    names = VALIDATION_NAMES if split in VALIDATION_NAMES else (split,)
    rows = _read_split(dataset_name, style, path, ("train",) if path.is_file() else names)
    if not rows:
        raise UsageError(f"data set {str(path)!r} has no example in a split {split!r}")
    return rows


def _columns(dataset_name: str, style: str | None) -> dict[str, tuple[str]]:
    """The columns that a style, or the data set's name, asks for, as `read_rows` takes them."""
    of_name = ("instruction", "answer") if is_labelled(dataset_name) else ("instruction",)
    return {column: (column,) for column in (columns_of(style) if style else of_name)}


def _split_files(path: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the split that has one of `names`; a lone file is a train split."""
    if path.is_file():
        return [path] if "train" in names else []
    if (path / "dataset_info.json").is_file():
        raise UsageError(
            f"{str(path)!r} is one saved split, not a DatasetDict; save it as "
            'DatasetDict({"train": ...}).save_to_disk(...)'
        )
    splits = split_files(path)
    name = next((name for name in names if name in splits), None)
    if name is None and "train" in names:
        raise UsageError(
            f"data set {str(path)!r} has no train split; it has {', '.join(splits) or 'no split'}; "
            "python -m data.prepare_instructions --input_split NAME takes one"
        )
    return splits[name] if name else []


def _read_split(
    dataset_name: str, style: str | None, path: Path, names: tuple[str, ...]
) -> "Dataset | None":
    """The split under one of its names; None if it is not there."""
    import datasets

    files = _split_files(path, names)
    if not files:
        return None
    with _explained(dataset_name, names[0]):
        table = read_table(files, _columns(dataset_name, style))
        say_unread_parts(files[0])
    # The default fingerprint is a hash of a pickled copy of the whole table.
    return datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint())


@contextmanager
def _explained(dataset_name: str, split: str) -> Iterator[None]:
    """Say of which data set and split the reader of its files complains."""
    try:
        yield
    except MissingColumn as error:
        raise _lacks(dataset_name, split, error.column, error.names) from None
    except UsageError as error:
        raise UsageError(f"cannot read data set {dataset_name!r}: {error}") from None


def _lacks(dataset_name: str, split: str, column: str, names: list[str]) -> UsageError:
    if column == "topic":
        return UsageError(
            f"data set {dataset_name!r} ({split}) lacks column 'topic', which --prompt_style "
            f"{TOPIC} trains with; python -m topics.assign --private {dataset_name} makes a data "
            "set that has it"
        )
    return UsageError(
        f"data set {dataset_name!r} ({split}) lacks column {column!r}: it has {listed(names)}, "
        f"and one whose name {'starts' if is_labelled(dataset_name) else 'does not start'} with "
        f"'labelled' needs {list(_columns(dataset_name, None))}; make it by python -m "
        "data.prepare_instructions"
    )


def _load_from_hub(dataset_name: str, style: str | None) -> dict[str, "Dataset"]:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(dataset_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = in_one_line(error, 160)
        raise UsageError(f"{tried_places(dataset_name)} ({reason})") from None
    if "train" not in loaded:
        raise UsageError(
            f"data set {dataset_name!r} has no train split; it has {', '.join(loaded)}"
        )
    validation = next((name for name in VALIDATION_NAMES if name in loaded), None)
    splits = {"train": loaded["train"]} | ({"val": loaded[validation]} if validation else {})
    for split, rows in splits.items():
        for column in _columns(dataset_name, style):
            if column not in rows.column_names:
                raise _lacks(dataset_name, split, column, rows.column_names)
    return splits
