"""Turn answers into a data set that training takes: columns `instruction` and `answer`.

    python -m query_gpt35_for_annotation.build_dataset --answers annotations/synthetic \\
        --output data/labelled_synthetic
    python generate_train_command.py --dataset_name labelled_synthetic --prompt_style vicuna ...

The split depends on the seed and the instructions only, not on the order in which answers came.
Truncated, refused, empty and failed answers are left out and counted.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from utils.command_line.parser import answer_early, flag, positive_float, read_flags


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


answer_early(__name__, Settings, __doc__)

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from query_gpt35_for_annotation.client import OK
from query_gpt35_for_annotation.job import answers_file, placed_answers
from utils.cli import UsageError, run_cli, say
from utils.files import record_at
from utils.folders import claimed, require_new, save_dataset
from utils.texts.data_sets import is_labelled


def split_pairs(
    instructions: Iterable[bytes], val_size: int, test_size: int, seed: int
) -> dict[str, list[bytes]]:
    """Split instructions by the rank of a keyed hash of them.

    Args:
        instructions: their own hashes.

    Returns:
        The same, by split.
    """

    def rank(instruction: bytes) -> bytes:
        return hashlib.sha256(f"{seed}:{instruction.hex()}".encode()).digest()

    ranked = sorted(instructions, key=rank)
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
    with claimed(output):
        build(settings, folder, output)


def build(settings: Settings, folder: Path, output: Path) -> None:
    """Make `output` of the answers in `folder`; what lies in memory is where they are."""
    require_new(output)
    if not answers_file(folder).exists():
        raise UsageError(f"--answers {settings.answers!r} has no answers.jsonl; annotate writes it")
    # The last record of an instruction counts.
    places: dict[bytes, int] = {}
    others: dict[bytes, str] = {}
    for place, record in placed_answers(folder):
        key, status = bytes.fromhex(record["instruction_sha256"]), record["status"]
        if status == OK:
            places[key] = place
            others.pop(key, None)
        else:
            others[key] = sys.intern(status)
            places.pop(key, None)
    val_size, test_size = (
        math.ceil(size * len(places)) if size < 1 else int(size)
        for size in (settings.val_size, settings.test_size)
    )
    outcomes = Counter(others.values())
    left_out = ", ".join(f"{number:,} {status}" for status, number in sorted(outcomes.items()))
    say(f"left out of {len(places) + len(others):,} instructions: {left_out or 'none'}")
    if val_size + test_size >= len(places):
        raise UsageError(
            f"--val_size and --test_size take {val_size + test_size:,} of {len(places):,} usable "
            "answers, which leaves none to train on"
        )
    splits = split_pairs(places, val_size, test_size, settings.seed)
    preparation = {"answers": str(folder), "seed": settings.seed, "left_out": outcomes}
    with open(answers_file(folder), "rb") as file:
        rows = {
            name: (record_at(file, places[key]) for key in part) for name, part in splits.items()
        }
        save_dataset(output, rows, ["instruction", "answer"], preparation)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in splits.items())
    say(f"wrote {output}: {sizes}")


if __name__ == "__main__":
    run_cli(main)
