"""Canaries: made-up training rows that hold a random secret, to measure what a model memorises.

The method is Carlini et al.'s ("The Secret Sharer", 2019): rows of one public template go into
training, and afterwards a model that memorised them finds their secrets likelier than others that
were never inserted. Secrets follow from the seed alone, so a continued run trains on the same rows
and `evaluation.memorisation` can make them again. They are nobody's data, but rows like any other
in training: sampled, clipped, noised, and counted in N. No torch.
"""

import argparse
import hashlib
from collections.abc import Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError
from utils.texts.data_sets import is_labelled

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


def canary(secret: str, labelled: bool) -> dict[str, str]:
    """The training row of a secret: an instruction, or a pair whose answer holds it."""
    text = TEMPLATE.format(secret=secret)
    return {"instruction": QUESTION, "answer": text} if labelled else {"instruction": text}


def num_canary_rows(args: argparse.Namespace) -> int:
    """Rows that canaries add to the train split: N is the data set's own number and this."""
    return args.num_canaries * args.canary_repeats


def with_canaries(rows: "Dataset", args: argparse.Namespace) -> "Dataset":
    """The train split, and after it every canary `--canary_repeats` times.

    Raises:
        UsageError: a column that is trained on holds something else than text.
    """
    from datasets import Dataset, concatenate_datasets

    if args.num_canaries == 0:
        return rows
    labelled = is_labelled(args.dataset_name)
    chosen = islice(secrets(args.seed), args.num_canaries)
    inserted = [canary(secret, labelled) for secret in chosen]
    rows = rows.select_columns(list(inserted[0]))
    for name, feature in rows.features.items():
        kind = getattr(feature, "dtype", type(feature).__name__)
        if kind not in ("string", "large_string"):
            raise UsageError(f"{args.dataset_name}, column {name!r}: {kind}, not text")
    canaries = Dataset.from_list(inserted * args.canary_repeats, features=rows.features)
    return concatenate_datasets([rows, canaries])


def require_whole_canaries(lengths: np.ndarray, args: argparse.Namespace) -> None:
    """Refuse to train on canaries whose end, and secret, `--max_seq_len` cuts off.

    Args:
        lengths: int [examples], tokens of every row of `with_canaries`.

    Raises:
        UsageError: a canary has as many tokens as a sequence may have.
    """
    if args.num_canaries and lengths[-num_canary_rows(args) :].max() >= args.max_seq_len:
        raise UsageError(
            f"--max_seq_len {args.max_seq_len} cuts the canaries' secrets off; give a larger one, "
            "or leave --num_canaries out"
        )
