"""What every engine is given: a model, instructions, LoRA; run in a process of its own.

Peers import this in their environment, which lacks most of what the toolkit's own modules need.
"""

import argparse
import json
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.environments import ROOT
from utils.cli import say

PEERS = ("published-loop", "opacus-hooks", "opacus-ghost", "opake")
OURS = ("ours-nondp", "ours-dp")


@dataclass(frozen=True)
class Job:
    """One engine's task.

    Attributes:
        engine: a name in `PEERS` or `OURS`.
        folder: holds `model`, `instructions.jsonl` and `tokens.npz`.
        targets: LoRA's target modules; `all-linear` alone for all.
        dtype: of the frozen base.
        steps: logical steps that are timed, after a warm-up.
    """

    engine: str
    folder: str
    num_examples: int
    max_seq_len: int
    perdevice_bs: int
    lora_r: int
    targets: tuple[str, ...]
    dtype: str
    steps: int

    @property
    def model(self) -> str:
        """Folder of the base model."""
        return str(Path(self.folder) / "model")

    @property
    def dataset(self) -> str:
        """File of the instructions."""
        return str(Path(self.folder) / "instructions.jsonl")

    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens."""
        return np.load(Path(self.folder) / "tokens.npz")["lengths"]

    def examples(self) -> list[np.ndarray]:
        """Token ids of every example, int64 [tokens] each."""
        tokens = np.load(Path(self.folder) / "tokens.npz")
        return np.split(tokens["ids"], np.cumsum(tokens["lengths"])[:-1])


def make_job(engine: str, folder: str, args: argparse.Namespace) -> Job:
    """An engine's task, from the flags of a benchmark."""
    names = ("num_examples", "max_seq_len", "perdevice_bs", "lora_r", "dtype", "steps")
    settings = {name: getattr(args, name) for name in names}
    return Job(engine=engine, folder=folder, targets=tuple(args.target_modules), **settings)


def measure(python: dict[str, Path], jobs: list[Job], rounds: int) -> dict[str, list[dict]]:
    """Run every job once a round, each time in a new process.

    Args:
        python: the interpreter of each engine.

    Returns:
        For each engine its results, one a round: `seconds` (of every timed step),
        `processed_tokens`, `peak_memory_mib`.
    """
    results: dict[str, list[dict]] = {job.engine: [] for job in jobs}
    for number in range(1, rounds + 1):
        for job in jobs:
            say(f"round {number} of {rounds}: {job.engine}")
            command = [str(python[job.engine]), "-m", "benchmarks.engine", json.dumps(asdict(job))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{job.engine} failed:\n{done.stderr[-3000:]}")
            results[job.engine].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def summary(engine: str, lengths: np.ndarray, results: list[dict]) -> dict:
    """What is written for an engine: medians over all timed steps, and all of them."""
    seconds = [value for result in results for value in result["seconds"]]
    real = int(lengths.sum())
    return {
        "engine": engine,
        "real_tokens_per_second": real / statistics.median(seconds),
        "processed_over_real": results[0]["processed_tokens"] / real,
        "peak_memory_mib": statistics.median(result["peak_memory_mib"] for result in results),
        "seconds": seconds,
    }
