"""Data sets: find them, count them without loading, tokenise once, collate."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError, in_one_line
from utils.prompts import UNCONDITIONAL, training_ids

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class TokenisedExamples:
    """A split as one flat array of token ids; example i is ids[offsets[i]:offsets[i + 1]].

    Attributes:
        ids: int32 [tokens]; may be a memory map.
        offsets: int64 [examples + 1].
        loss_starts: int32 [examples], index in the example of the first token with loss.
    """

    ids: np.ndarray
    offsets: np.ndarray
    loss_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.loss_starts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens per example."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """A hash of every token. Computed from private data: for `private/` alone."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.loss_starts):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def collate(
        self, indices: np.ndarray, pad_id: int, device: "torch.device | str" = "cpu"
    ) -> dict[str, "torch.Tensor"]:
        """Right-pad a microbatch: `input_ids` [examples, tokens], `lengths`, `loss_starts`."""
        import torch

        lengths = self.lengths[indices]
        positions = np.arange(int(lengths.max()))
        is_token = positions < lengths[:, None]
        input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
        input_ids[is_token] = self.ids[(self.offsets[indices, None] + positions)[is_token]]
        arrays = {
            "input_ids": input_ids,
            "lengths": lengths,
            "loss_starts": self.loss_starts[indices].astype(np.int64),
        }
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


# Rows that are tokenised, and written, at once.
ROWS_AT_ONCE = 1000
TOKEN_FILES = {"ids": np.int32, "lengths": np.int32, "loss_starts": np.int32}


def tokenise(
    rows: Iterable[dict],
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    max_seq_len: int,
    folder: Path,
) -> None:
    """Tokenise every row of a split once, into files in `folder` for `open_tokens`.

    The memory that this takes does not depend on the number of rows.

    Args:
        rows, style: see `_token_arrays`.
        folder: made if it is not there; files in it are replaced. What it holds is as private as
            the rows are.

    Raises:
        UsageError: see `_token_arrays`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in TOKEN_FILES}
        for arrays in _token_arrays(rows, tokenizer, style, max_seq_len):
            for name, file in files.items():
                file.write(arrays[name])


def open_tokens(folder: Path) -> TokenisedExamples:
    """What `tokenise` wrote to `folder`; the token ids, by far the largest part, stay on disk.

    Once this has returned, the files may be deleted.
    """
    return _examples(
        ids=np.memmap(folder / "ids", dtype=TOKEN_FILES["ids"], mode="r"),
        lengths=np.fromfile(folder / "lengths", dtype=TOKEN_FILES["lengths"]),
        loss_starts=np.fromfile(folder / "loss_starts", dtype=TOKEN_FILES["loss_starts"]),
    )


def tokenised(
    rows: Iterable[dict], tokenizer: "PreTrainedTokenizerBase", style: str, max_seq_len: int
) -> TokenisedExamples:
    """Tokenise the rows of a split that is small enough for memory; nothing reaches the disk.

    Args:
        rows, style: see `_token_arrays`.

    Raises:
        UsageError: see `_token_arrays`.
    """
    parts = list(_token_arrays(rows, tokenizer, style, max_seq_len))
    return _examples(
        **{name: np.concatenate([part[name] for part in parts]) for name in TOKEN_FILES}
    )


def _examples(ids: np.ndarray, lengths: np.ndarray, loss_starts: np.ndarray) -> TokenisedExamples:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenisedExamples(ids, offsets, loss_starts)


def _token_arrays(
    rows: Iterable[dict], tokenizer: "PreTrainedTokenizerBase", style: str, max_seq_len: int
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of `TOKEN_FILES` for some rows after others.

    Args:
        rows: objects with `instruction` and, for any style but `uncond_generation`, `answer`.

    Raises:
        UsageError: a value is not a string, or no example has a token that carries loss.
    """
    columns = ["instruction"] if style == UNCONDITIONAL else ["instruction", "answer"]
    rows, done, with_loss = iter(rows), 0, False
    while some := list(islice(rows, ROWS_AT_ONCE)):
        for number, row in enumerate(some, start=done):
            for column in columns:
                if not isinstance(row[column], str):
                    kind = type(row[column]).__name__
                    raise UsageError(f"row {number}, column {column!r}: {kind}, not str")
        done += len(some)
        texts = [[row[column] for row in some] for column in columns]
        examples = training_ids(tokenizer, style, *texts, max_seq_len=max_seq_len)
        with_loss = with_loss or any(start < len(ids) for ids, start in examples)
        values = {
            "ids": np.concatenate([ids for ids, _ in examples]),
            "lengths": [len(ids) for ids, _ in examples],
            "loss_starts": [start for _, start in examples],
        }
        yield {name: np.asarray(values[name], dtype) for name, dtype in TOKEN_FILES.items()}
    if not with_loss:
        raise UsageError(
            f"every example is longer than --max_seq_len {max_seq_len} before its answer begins"
        )
