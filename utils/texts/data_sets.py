"""Data sets: find them, count them without loading, tokenise once, collate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UsageError, in_one_line

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER = Path("data")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
VALIDATION_NAMES = ("val", "validation")


def is_labelled(dataset_name: str) -> bool:
    """Whether a data set holds (instruction, answer) pairs: its name starts with `labelled`."""
    return Path(dataset_name).name.startswith("labelled")


def find_dataset(dataset_name: str) -> Path | None:
    """The folder or file of a data set: `data/NAME`, then NAME as a path; None for a hub id."""
    for base in (DATA_FOLDER / dataset_name, Path(dataset_name).expanduser()):
        for candidate in (base, *(base.with_name(base.name + s) for s in FILE_SUFFIXES)):
            is_data_folder = candidate.is_dir() and any(candidate.iterdir())
            if is_data_folder or (candidate.is_file() and candidate.suffix in FILE_SUFFIXES):
                return candidate
    return None


def tried_places(dataset_name: str) -> str:
    """Where `find_dataset` looked and how data sets are made, for an error message."""
    return (
        f"no data set {dataset_name!r}: tried {DATA_FOLDER / dataset_name} and {dataset_name} "
        f"(a saved DatasetDict, or {', '.join(FILE_SUFFIXES)}), then the hub; "
        "data/prepare_chatbot_arena.py and data/prepare_quickstart.py make data sets"
    )


def count_train_examples(dataset_name: str) -> int | None:
    """Rows of the train split, from metadata and without loading them; None if it is not here.

    Raises:
        UsageError: the data set is here, but empty or not readable.
    """
    path = find_dataset(dataset_name)
    if path is None:
        return None
    try:
        count = sum(_count_rows(file) for file in _split_files(path, ("train",)))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read data set {str(path)!r}: {error}") from None
    if count == 0:
        raise UsageError(f"data set {str(path)!r} has no example in its train split")
    return count


def _split_files(path: Path, names: tuple[str, ...]) -> list[Path]:
    """Files of a split; a lone file is a train split."""
    if path.is_file():
        return [path] if "train" in names else []
    if (path / "dataset_info.json").is_file():
        raise UsageError(
            f"{str(path)!r} is one saved split, not a DatasetDict; save it as "
            'DatasetDict({"train": ...}).save_to_disk(...)'
        )
    for name in names:
        if (path / name / "state.json").is_file():
            state = json.loads((path / name / "state.json").read_text())
            return [path / name / entry["filename"] for entry in state["_data_files"]]
        for suffix in FILE_SUFFIXES:
            if (path / f"{name}{suffix}").is_file():
                return [path / f"{name}{suffix}"]
    if "train" in names:
        raise UsageError(f"data set {str(path)!r} has no train split")
    return []


def _count_rows(file: Path) -> int:
    if file.suffix == ".arrow":
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(source))
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(file).num_rows
    if file.suffix == ".jsonl":
        with open(file, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    rows = json.loads(file.read_text())
    if not isinstance(rows, list):
        raise UsageError(f"{str(file)!r} is not a JSON list of objects")
    return len(rows)


def load_splits(dataset_name: str) -> dict[str, "Dataset"]:
    """Load the `train` split and, where there is one, the validation split as `val`.

    Raises:
        UsageError: not found, empty, or without the columns that its name asks for.
    """
    import datasets

    datasets.disable_progress_bars()
    path = find_dataset(dataset_name)
    if path is None:
        splits = _load_from_hub(dataset_name)
    else:
        found = {"train": _read_split(path, ("train",)), "val": _read_split(path, VALIDATION_NAMES)}
        splits = {split: rows for split, rows in found.items() if rows is not None}
    if len(splits["train"]) == 0:
        raise UsageError(f"data set {dataset_name!r} has no example in its train split")
    for split, rows in splits.items():
        _require_columns(dataset_name, split, rows)
    return splits


def load_split(dataset_name: str, split: str) -> "Dataset":
    """Load one split of a data set that is here, or all rows of a lone file.

    Raises:
        UsageError: not here, no such split, empty, or without the columns that its name asks for.
    """
    import datasets

    datasets.disable_progress_bars()
    path = find_dataset(dataset_name)
    if path is None:
        raise UsageError(f"no data set {dataset_name!r} here; make it, or give its path")
    names = VALIDATION_NAMES if split in VALIDATION_NAMES else (split,)
    rows = _read_split(path, ("train",) if path.is_file() else names)
    if not rows:
        raise UsageError(f"data set {str(path)!r} has no example in a split {split!r}")
    _require_columns(dataset_name, split, rows)
    return rows


def _read_split(path: Path, names: tuple[str, ...]) -> "Dataset | None":
    """A split under one of its names; None if it is not there."""
    import datasets

    try:
        files = [str(file) for file in _split_files(path, names)]
        if not files:
            return None
        if files[0].endswith(".arrow"):
            parts = [datasets.Dataset.from_file(file) for file in files]
            return datasets.concatenate_datasets(parts)
        if files[0].endswith(".parquet"):
            return datasets.Dataset.from_parquet(files)
        return datasets.Dataset.from_list(_read_json_rows(Path(files[0])))
    except UsageError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = in_one_line(error, 200)
        raise UsageError(f"cannot read data set {str(path)!r}: {reason}") from None


def _require_columns(dataset_name: str, split: str, rows: "Dataset") -> None:
    wanted = ["instruction", "answer"] if is_labelled(dataset_name) else ["instruction"]
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise UsageError(
            f"data set {dataset_name!r} ({split}) lacks column {missing[0]!r}: it has "
            f"{rows.column_names}, and one whose name "
            f"{'starts' if is_labelled(dataset_name) else 'does not start'} with 'labelled' "
            f"needs {wanted}"
        )


def _read_json_rows(file: Path) -> list[dict]:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    else:
        rows = json.loads(file.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of JSON objects")
    return rows


def _load_from_hub(dataset_name: str) -> dict[str, "Dataset"]:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = in_one_line(error, 160)
        raise UsageError(f"{tried_places(dataset_name)} ({reason})") from None
    validation = next((name for name in VALIDATION_NAMES if name in loaded), None)
    if "train" not in loaded:
        raise UsageError(f"data set {dataset_name!r} has no train split: {list(loaded)}")
    splits = {"train": loaded["train"]}
    return splits | ({"val": loaded[validation]} if validation else {})
