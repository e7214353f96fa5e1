"""Small training runs for tests: flags and data."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.paths import ROOT
from utils.cli import stop_handlers_restored
from utils.models.loading import load_base_model

NUM_EXAMPLES = 64


TOPICS = ("rivers, lakes", "cooking, bread, salt", "chess")


def save_dataset(
    folder: Path, *, rows: int = NUM_EXAMPLES, labelled: bool = False, topics: bool = False
) -> str:
    """Save a DatasetDict of texts of 1 to 30 letters, always the same ones; returns its path.

    Args:
        topics: each has one of `TOPICS`, too.
    """
    random = np.random.default_rng(0)

    def texts(count):
        return [
            "".join(random.choice(list("abcdef "), random.integers(1, 31))) for _ in range(count)
        ]

    def split(count):
        columns = {"instruction": texts(count)}
        if labelled:
            columns["answer"] = texts(count)
        if topics:
            columns["topic"] = [TOPICS[row % len(TOPICS)] for row in range(count)]
        return datasets.Dataset.from_dict(columns)

    path = folder / ("labelled_letters" if labelled else "topics" if topics else "letters")
    datasets.DatasetDict(train=split(rows), val=split(8)).save_to_disk(path)
    return str(path)


def flags(model: str, dataset: str, output_dir: Path, *more: str, dp: bool = True) -> list[str]:
    """Flags of a run `job` of 8 steps: sampling rate 1/8, no dropout, a checkpoint at 3 and 6.

    Later flags win, so `more` may change any of them.
    """
    private = ["--eps=8", "--delta=1e-3", "--clip=0.5"]
    return [
        f"--dataset_name={dataset}", f"--model_name={model}", f"--output_dir={output_dir}",
        "--job_sess=job", "--prompt_style=uncond_generation", "--max_seq_len=32", "--total_bs=8",
        "--perdevice_bs=2", "--num_epochs=1", "--lr=0.01", "--loss_normalization=tokens",
        "--lora_dropout=0", "--save_steps=3", *(private if dp else ["--eps=-1"]), *more,
    ]  # fmt: skip


def draw_before_adapter(patch: pytest.MonkeyPatch) -> None:
    """Let train.py draw its adapter from the seed as another version of a library might."""

    def loaded(*given):
        base = load_base_model(*given)
        torch.rand(1)
        return base

    patch.setattr("train.load_base_model", loaded)


def in_process(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """The exit code of a script, run here as by a process of its own with one thread."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stop_handlers_restored():
            return main(argv) or 0
    finally:
        torch.set_num_threads(threads)


def run_process(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a Python command from the repository's root, with one thread a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        **options,
    )  # fmt: skip
