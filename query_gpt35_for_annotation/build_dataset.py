"""Turn answers into a data set that training takes: columns `instruction` and `answer`.

    python -m query_gpt35_for_annotation.build_dataset --answers annotations/synthetic \\
        --output data/labelled_synthetic
    python generate_train_command.py --dataset_name labelled_synthetic --prompt_style vicuna ...

The split depends on the seed and the instructions only, not on the order in which answers came.
Truncated, refused, empty and failed answers are left out and counted.
"""

import argparse
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from query_gpt35_for_annotation.client import OK
from query_gpt35_for_annotation.job import answers_file, read_records
from utils.cli import UsageError, run_cli, say
from utils.command_line.parser import flag, positive_float, read_flags
from utils.folders import save_dataset
from utils.texts.data_sets import is_labelled


def _split_size(text: str) -> float:
    size = positive_float(text)
    if size >= 1 and size != int(size):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a share below 1")
    return size


def _size_of(split: str) -> Any:
    return flag(
        f"pairs in the {split} split: a number, or a share below 1, rounded up",
        0.05,
        type=_split_size,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `build_dataset`."""

    answers: str = flag(
        "the folder that annotate or read_batch wrote", required=True, metavar="DIR"
    )
    output: str = flag(
        "folder to write, which must not exist; training takes pairs from a data set whose name "
        "starts with 'labelled'",
        required=True,
        metavar="data/labelled_NAME",
    )
    val_size: float = _size_of("val")
    test_size: float = _size_of("test")
    seed: int = flag("another one gives another split", 0, type=int)


def split_pairs(records: list[dict], val_size: int, test_size: int, seed: int) -> dict:
    """Split records by the rank of a keyed hash of their instructions.

    Returns:
        Records by split.
    """

    def rank(record: dict) -> bytes:
        return hashlib.sha256(f"{seed}:{record['instruction_sha256']}".encode()).digest()

    ranked = sorted(records, key=rank)
    held_out = val_size + test_size
    return {
        "train": ranked[held_out:],
        "val": ranked[:val_size],
        "test": ranked[val_size:held_out],
    }


def main(argv: list[str] | None = None) -> None:
    """Build the data set from the command line."""
    settings = read_flags(Settings, __doc__, argv)
    folder, output = Path(settings.answers), Path(settings.output)
    if not is_labelled(settings.output):
        raise UsageError(
            f"--output {settings.output!r} must have a name that starts with 'labelled', such as "
            f"{str(output.with_name('labelled_' + output.name))!r}; training tells pairs by it"
        )
    if output.exists():
        raise UsageError(f"--output {settings.output!r} exists; name another, or remove it first")
    if not answers_file(folder).exists():
        raise UsageError(f"--answers {settings.answers!r} has no answers.jsonl; annotate writes it")
    records = read_records(folder).values()
    pairs = [record for record in records if record["status"] == OK]
    val_size, test_size = (
        math.ceil(size * len(pairs)) if size < 1 else int(size)
        for size in (settings.val_size, settings.test_size)
    )
    outcomes = Counter(record["status"] for record in records if record["status"] != OK)
    left_out = ", ".join(f"{number:,} {status}" for status, number in sorted(outcomes.items()))
    say(f"left out of {len(records):,} instructions: {left_out or 'none'}")
    if val_size + test_size >= len(pairs):
        raise UsageError(
            f"--val_size and --test_size take {val_size + test_size:,} of {len(pairs):,} usable "
            "answers, which leaves none to train on"
        )
    splits = split_pairs(pairs, val_size, test_size, settings.seed)
    preparation = {"answers": str(folder), "seed": settings.seed, "left_out": outcomes}
    save_dataset(output, splits, ["instruction", "answer"], preparation)
    rows = ", ".join(f"{name} {len(part):,}" for name, part in splits.items())
    say(f"wrote {output}: {rows}")


if __name__ == "__main__":
    run_cli(main)
