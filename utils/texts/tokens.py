"""Token ids of a split: made once, mapped by every process, collated."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError
from utils.folders import private_folder
from utils.progress import Progress
from utils.texts.prompts import columns_of, training_ids

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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

    def counts(self, eos_id: int, rows: int) -> dict[str, int]:
        """Of the first so many rows, of those that were cut, and of those without loss.

        Computed from private data: for `private/` alone.

        Args:
            eos_id: ends every row that is whole.
            rows: after which come the canaries of an audit.
        """
        is_cut = self.ids[self.offsets[1 : rows + 1] - 1] != eos_id
        without_loss = (self.loss_starts >= self.lengths)[:rows]
        return {
            "rows": rows,
            "cut": int(is_cut.sum()),
            "without_loss": int(without_loss.sum()),
        }

    def fingerprint(self) -> str:
        """A hash of every token. Computed from private data: for `private/` alone."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.loss_starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def keys(self) -> np.ndarray:
        """What each row holds, as a number: uint64 [examples].

        A row's own tokens decide it, whatever other rows there are and wherever it stands. Computed
        from private data: for `private/` alone.
        """
        places = zip(self.offsets[:-1], self.offsets[1:], self.loss_starts)
        digests = [
            hashlib.blake2b(self.ids[first:last].tobytes(), digest_size=8, salt=start.tobytes())
            for first, last, start in places
        ]
        return np.frombuffer(b"".join(each.digest() for each in digests), dtype=np.uint64)

    def collate(
        self,
        indices: np.ndarray,
        pad_id: int,
        device: "torch.device | str" = "cpu",
        *,
        rows: int | None = None,
        tokens: int | None = None,
    ) -> dict[str, "torch.Tensor"]:
        """Right-pad a microbatch: `input_ids` [rows, tokens], `lengths`, `loss_starts` [rows].

        Args:
            rows: those beyond the examples are empty: of length 0; None for as many as examples.
            tokens: None for the longest example's.
        """
        import torch

        from utils.devices import to_device

        rows = rows or len(indices)
        lengths, loss_starts = np.zeros((2, rows), dtype=np.int64)
        lengths[: len(indices)] = self.lengths[indices]
        loss_starts[: len(indices)] = self.loss_starts[indices]
        positions = np.arange(tokens or int(lengths.max()))
        is_token = positions < lengths[:, None]
        offsets = np.zeros(rows, dtype=np.int64)
        offsets[: len(indices)] = self.offsets[indices]
        input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
        input_ids[is_token] = self.ids[(offsets[:, None] + positions)[is_token]]
        arrays = {"input_ids": input_ids, "lengths": lengths, "loss_starts": loss_starts}
        return {name: to_device(torch.from_numpy(a), device) for name, a in arrays.items()}


# Rows that are tokenised, and written, at once.
ROWS_AT_ONCE = 1000


TOKEN_FILES = {"ids": np.int32, "lengths": np.int32, "loss_starts": np.int32}


def tokenise(
    rows: Iterable[dict],
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    max_seq_len: int,
    folder: Path,
    more: TokenisedExamples | None = None,
) -> None:
    """Tokenise every row of a split once, into files in `folder` for `open_tokens`.

    The memory that this takes does not depend on the number of rows.

    Args:
        rows, style: see `_token_arrays`.
        folder: made if it is not there; files in it are replaced. What it holds is as private as
            the rows are.
        more: examples that come after the rows.

    Raises:
        UsageError: see `_token_arrays`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in TOKEN_FILES}
        for arrays in _token_arrays(rows, tokenizer, style, max_seq_len):
            for name, file in files.items():
                file.write(arrays[name].data)
        if more is not None:
            for name, file in files.items():
                file.write(np.asarray(getattr(more, name), TOKEN_FILES[name]).data)


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
        rows: objects with the `columns_of` the style.

    Raises:
        UsageError: a value is not a string, or no example has a token that carries loss.
    """
    columns = columns_of(style)
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
            f"every example is longer than --max_seq_len {max_seq_len} before its "
            f"{columns[-1]} begins"
        )


def tokenise_once(
    splits: dict[str, "Dataset"],
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    max_seq_len: int,
    folder: Path,
    more: Mapping[str, TokenisedExamples] | None = None,
) -> dict[str, TokenisedExamples]:
    """Tokenise on one process of each machine, into files that all of its processes map.

    The files are gone as soon as all have them open: nothing of the data stays on the disk. Where a
    kill left some, the next call removes them.

    Args:
        splits, style: see `tokenise`.
        folder: a run's; files are made under its `private/`, and folders that were made for them
            go with them.
        more: examples that come after the rows of a split, by its name.

    Raises:
        UsageError: see `tokenise`.
    """
    from accelerate import PartialState

    state = PartialState()
    first = state.process_index - state.local_process_index
    private = folder / "private"
    place = private / f"tokens-{first}"
    try:
        if state.is_local_main_process:
            # Of a job that was killed, perhaps of other machines; nobody has made new ones yet.
            for stale in private.glob("tokens-*"):
                shutil.rmtree(stale, ignore_errors=True)
        state.wait_for_everyone()
        if state.is_local_main_process:
            private_folder(private, explained=False)
            for split, rows in splits.items():
                hidden = not state.is_main_process
                rows = Progress(rows, f"tokenise {split}", unit="row", hidden=hidden, leave=False)
                tokenise(
                    rows, tokenizer, style, max_seq_len, place / split, (more or {}).get(split)
                )
        state.wait_for_everyone()
        data = {split: open_tokens(place / split) for split in splits}
        state.wait_for_everyone()
    finally:
        if state.is_local_main_process:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # Folders that hold something else stay.
                for made in (private, folder, folder.parent):
                    made.rmdir()
    return data
