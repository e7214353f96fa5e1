"""Replay training on neighbouring data: does one example move the clipped sum by at most C?

    python -m privacy_checks.replay

Runs the whole of train.py twice on a tiny model, on the CPU: with every example in every batch,
and without example k in step k. Nothing else differs: the optimizer is given one public vector in
place of what is released, so that each step starts from the same parameters. The clipped sum may
then move by at most C(1 + 1e-5), the optimizer's vector not at all, and the same holds for every
adaptive sequence of steps. Mixed lengths; Type A (uncond_generation) and Type C (vicuna); gradient
checkpointing off and on; a clip norm that most examples reach and one that half of them do; one
process and two; with dropout. With --unit it is person k, of one to six rows, that is left out of
step k. Exit code 0 if none moves a sum by more, else 1.
"""

import itertools
import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from privacy_checks.observed_run import Observation, PublicSteps, observe, save_tiny_model
from privacy_checks.persons import (
    ROWS_IN_A_STEP,
    ReplayedPersons,
    replayed_owners,
    save_rows,
    unit_flags,
)
from utils.cli import EXIT_FAILED, EXIT_OK, run_cli, say
from utils.command_line.parser import flag, read_flags
from utils.files import write_json
from utils.runs.batching import GRID_STEP
from utils.texts.prompts import UNCONDITIONAL

TOLERANCE = 1e-5
# An example that moves the sum by this little less than C was clipped.
CLIPPED = 1e-4
STYLES = (UNCONDITIONAL, "vicuna")
# Most examples reach the first, about half of them the second: a coupling shows next to examples
# that it turns or lengthens.
CLIP_NORMS = (0.25, 1.4)
LONGEST = 60
DATASETS = {UNCONDITIONAL: "letters.jsonl", "vicuna": "labelled_letters.jsonl"}
WHAT = {False: "examples", True: "persons"}
RESULTS = "moves.json"

# Prompt style, gradient checkpointing, clip norm.
Case = tuple[str, bool, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the replay."""

    examples: int = flag("and as many steps", 8)
    unit: bool = flag("leave out persons of several rows, in a run that protects them", False)
    json: Path | None = flag("also write this", type=Path, metavar="FILE")


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    cases = list(itertools.product(STYLES, (False, True), CLIP_NORMS))
    results: list[dict] = [
        {
            "prompt_style": style,
            "gradient_checkpointing": checkpointing,
            "clip_norm": clip_norm,
            "processes": processes,
            "largest_move": max(moves),
            "examples_clipped": sum(move > 1 - CLIPPED for move in moves),
        }
        for processes in (1, 2)
        for (style, checkpointing, clip_norm), moves in zip(
            cases, replay(cases, settings.examples, processes, settings.unit)
        )
    ]
    for case in results:
        checkpointing = "on" if case["gradient_checkpointing"] else "off"
        print(
            f"{case['prompt_style']}, checkpointing {checkpointing}, C {case['clip_norm']:g}, "
            f"{case['processes']} process(es): largest move {case['largest_move']:.8f} C, "
            f"{case['examples_clipped']} of {settings.examples} {WHAT[settings.unit]} clipped"
        )
    passed = all(case["largest_move"] <= 1 + TOLERANCE for case in results)
    print(f"{'PASSED' if passed else 'FAILED'}: bound (1 + {TOLERANCE:g}) C")
    if settings.json:
        if settings.json.exists():
            say(f"{settings.json} is replaced")
        write_json(settings.json, {"passed": passed, "tolerance": TOLERANCE, "cases": results})
    return EXIT_OK if passed else EXIT_FAILED


def replay(
    cases: list[Case], examples: int, processes: int = 1, unit: bool = False
) -> list[list[float]]:
    """How far leaving out one example moves what the optimizer is given, over C / total_bs.

    Args:
        cases: what each pair of runs is made with.
        examples: in the data; each is left out in one step.
        unit: whether it is persons of several rows that are counted, left out and protected.
        processes: that share the batches; with more than one they talk through gloo.

    Returns:
        For each case a move for every example.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        _save_data(folder, replayed_owners(examples) if unit else np.arange(examples))
        if processes == 1:
            return _replay_in_process(folder, cases, examples, unit)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (folder, cases, examples, unit, processes, port)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=processes)
        return json.loads((folder / RESULTS).read_text())


def _save_data(folder: Path, owners: np.ndarray) -> None:
    random = np.random.default_rng(0)

    def text() -> str:
        # Half of them are so short that they pass together.
        longest = random.choice([GRID_STEP - 1, LONGEST])
        return "".join(random.choice(list("abcdef "), random.integers(1, longest)))

    for name in DATASETS.values():
        save_rows(folder / name, owners, text)


def _rank(
    rank: int,
    folder: Path,
    cases: list[Case],
    examples: int,
    unit: bool,
    processes: int,
    port: int,
) -> None:
    """One of several processes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    moves = _replay_in_process(folder, cases, examples, unit)
    if rank == 0:
        write_json(folder / RESULTS, moves)
    torch.distributed.destroy_process_group()


def _replay_in_process(
    folder: Path, cases: list[Case], examples: int, unit: bool
) -> list[list[float]]:
    torch.set_num_threads(1)
    moves = []
    for number, case in enumerate(cases):
        whole, without_one = (
            _run(folder, f"{number}-{leaves_out}", case, examples, unit, leaves_out)
            for leaves_out in (False, True)
        )
        *_, clip_norm = case
        moved = np.array(whole.clipped_sums) - np.array(without_one.clipped_sums)
        # Released were equal vectors: what differs in the updates came past the mechanism.
        moved_past = np.array(whole.updates) - np.array(without_one.updates)
        lengths = np.linalg.norm(moved, axis=1) + examples * np.linalg.norm(moved_past, axis=1)
        moves.append((lengths / clip_norm).tolist())
    return moves


class Replayed(PublicSteps):
    """Draws everyone, or all but example k in step k."""

    leaves_out: bool

    def draw(self, step: int) -> np.ndarray:
        everyone = np.arange(self.num_examples)
        return np.delete(everyone, step) if self.leaves_out else everyone


def _run(
    folder: Path, job: str, case: Case, examples: int, unit: bool, leaves_out: bool
) -> Observation:
    style, checkpointing, clip_norm = case
    argv = [
        f"--dataset_name={folder / DATASETS[style]}", f"--model_name={folder / 'model'}",
        f"--output_dir={folder}", f"--job_sess={job}", f"--prompt_style={style}",
        "--max_seq_len=400", "--perdevice_bs=1", "--lora_dropout=0.1", "--lr=0.01",
        "--loss_normalization=tokens", f"--clip={clip_norm}", "--eps=1e6", "--delta=1e-5",
        "--noise_multiplier=1", f"--total_bs={examples}", f"--num_epochs={examples}",
        f"--save_steps={examples}", "--insecure_fixed_noise_seed=0",
        *(["--gradient_checkpointing"] if checkpointing else []),
        *(unit_flags(ROWS_IN_A_STEP) if unit else []),
    ]  # fmt: skip
    return observe(argv, ReplayedPersons if unit else Replayed, leaves_out=leaves_out)


if __name__ == "__main__":
    run_cli(main)
