"""Canaries: made-up training rows that hold a random secret, to measure what a model memorises.

The method is Carlini et al.'s ("The Secret Sharer", 2019): rows of one public template go into
training, and afterwards a model that memorised them finds their secrets likelier than others that
were never inserted. Secrets follow from the seed alone, so a continued run trains on the same rows
and `evaluation.memorisation` can make them again. They are nobody's data, but rows like any other
in training: sampled, clipped, noised, and counted in N. No torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError
from utils.texts.prompts import columns_of

if TYPE_CHECKING:
    from datasets import Dataset

DIGITS = 9
TEMPLATE = "The code of the archive is {secret}."
QUESTION = "What is the code of the archive?"


def secrets(seed: int) -> Iterator[str]:
    """Distinct secrets of `DIGITS` digits without end: the same ones for a seed, always.

    A run with K canaries inserts the first K; those after them were never inserted. SHA-256, since
    no release of a library of random numbers may change what a run was trained on.
    """
    seen = set()
    for number in count():
        digest = hashlib.sha256(f"canary {number} of seed {seed}".encode()).digest()
        secret = f"{int.from_bytes(digest) % 10**DIGITS:0{DIGITS}}"
        if secret not in seen:
            seen.add(secret)
            yield secret


def canary(secret: str, style: str) -> dict[str, str]:
    """The training row of a secret: a question or topic that all share, and what holds it."""
    *asked, written = columns_of(style)
    return dict.fromkeys(asked, QUESTION) | {written: TEMPLATE.format(secret=secret)}


@dataclass(frozen=True)
class Canaries:
    """Which canaries a run's train split has.

    Attributes:
        count, repeats: so many different ones, each so many times.
        seed: their secrets follow from it.
    """

    count: int
    repeats: int
    seed: int

    @property
    def num_rows(self) -> int:
        """Rows that they add to the train split: N is the data set's own number and this."""
        return self.count * self.repeats

    def added_to(self, rows: "Dataset", dataset_name: str, style: str) -> "Dataset":
        """The train split of a data set, and after it every canary as a prompt style trains it.

        Raises:
            UsageError: a column that is trained on holds something else than text.
        """
        from datasets import Dataset, concatenate_datasets

        if self.count == 0:
            return rows
        inserted = [canary(secret, style) for secret in islice(secrets(self.seed), self.count)]
        rows = rows.select_columns(list(inserted[0]))
        for name, feature in rows.features.items():
            kind = getattr(feature, "dtype", type(feature).__name__)
            if kind not in ("string", "large_string"):
                raise UsageError(f"{dataset_name}, column {name!r}: {kind}, not text")
        canaries = Dataset.from_list(inserted * self.repeats, features=rows.features)
        return concatenate_datasets([rows, canaries])

    def require_whole(self, lengths: np.ndarray, max_seq_len: int) -> None:
        """Refuse to train on canaries whose end, and secret, `max_seq_len` cuts off.

        Args:
            lengths: int [examples], tokens of every row of `added_to`.

        Raises:
            UsageError: a canary has as many tokens as a sequence may have.
        """
        if self.count and lengths[-self.num_rows :].max() >= max_seq_len:
            raise UsageError(
                f"--max_seq_len {max_seq_len} cuts the canaries' secrets off; give a larger one, "
                "or leave --num_canaries out"
            )
