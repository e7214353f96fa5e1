"""Replay training on neighbouring data: what does one row's absence move?

    python -m privacy_checks.replay
    python -m privacy_checks.replay --model data/quickstart_model --dtype bfloat16

Runs the whole of train.py twice: with every row in every batch, and without row k in step k.
Nothing else differs: the optimizer is given one public vector in place of what is released, so that
each step starts from the same parameters. The clipped sum may then move by at most C(1 + 1e-5), the
optimizer's vector not at all, and the same holds for every adaptive sequence of steps. All the
others, each row's own clipped gradient, must not move at all on a CPU, to the last bit; on another
device by at most what the run's own report says.

The cases are of a tiny model on mixed lengths: Type A (uncond_generation) and Type C (vicuna);
gradient checkpointing off and on; a clip norm that most rows reach and one that half of them do;
one process and two; with dropout. Then 64 rows, of which some pass together and some do not, on a
model of 576 features, in float32 and bfloat16, with one thread and two; or, with one of --model,
--dtype, --device and --threads, on the one model that they say. With --unit it is person k, of one
to six rows, that is left out of step k of the tiny model's cases, in float32 and bfloat16 or in the
one of --dtype. Exit code 0 if nothing moves by more, else 1.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, positive_int, read_flags

DTYPES, THREADS = ("float32", "bfloat16"), (1, 2)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the replay."""

    examples: int = flag("of the tiny model, and as many steps", 8)
    unit: bool = flag("leave out persons of several rows, in a run that protects them", False)
    model: str | None = flag("replay this one alone: a folder or a hub id", metavar="PATH")
    dtype: str | None = flag(
        "of one model, float32 if not given; with --unit of the tiny one", choices=DTYPES
    )
    device: str | None = flag(
        "of one model, cpu if not given; auto: what training takes", choices=("cpu", "auto")
    )
    threads: int | None = flag("of one model on a CPU, 1 if not given", type=positive_int)
    json: Path | None = flag("also write this", type=Path, metavar="FILE")

    @property
    def one_model(self) -> bool:
        return any((self.model, self.dtype, self.device, self.threads))


answer_early(__name__, Settings, __doc__)

import itertools
import json
import os
import re
import socket
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from privacy_checks import tiny_model
from privacy_checks.observed_run import Observation, PublicSteps, observe, save_tiny_model
from privacy_checks.persons import (
    ROWS_IN_A_STEP,
    ReplayedPersons,
    replayed_owners,
    save_rows,
    unit_flags,
    write_rows,
)
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.dp_utils import clip_factors
from utils.files import write_json
from utils.privacy.mechanism import Private
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
RESULTS = "moves.json"

# A model so wide that its kernels change with the shape of a microbatch.
WIDE: dict[str, object] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip
WIDE_ROWS, WIDE_LONGEST, WIDE_BETWEEN, WIDE_CLIP_NORM = 64, 96, 20, 1.0
# So few steps where the wide model is replayed several times, and so many where a model is once.
WIDE_STEPS, STEPS = 3, 4

# Prompt style, gradient checkpointing, clip norm.
Case = tuple[str, bool, float]


@dataclass(frozen=True)
class Moves:
    """What leaving out one row moved, over the clip norm, for each step.

    Attributes:
        total: l2 norm of the move of what the optimizer is given, as a sum.
        others: l2 norm of the move of all other rows' clipped gradients together.
        allowed: what others may move by.
    """

    total: list[float]
    others: list[float]
    allowed: float = 0.0

    @property
    def passed(self) -> bool:
        return max(self.total) <= 1 + TOLERANCE and max(self.others) <= self.allowed


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    if settings.unit:
        for name in ("model", "device", "threads"):
            if getattr(settings, name) is not None:
                raise UsageError(f"--unit is of the tiny model on a CPU: leave --{name} out")
        found = [
            (case | {"dtype": dtype}, moves)
            for dtype in ([settings.dtype] if settings.dtype else DTYPES)
            for case, moves in _tiny_cases(settings, dtype)
        ]
    else:
        found = _one_model(settings) if settings.one_model else _all_cases(settings)
    results = [case | _figures(moves) for case, moves in found]
    for case in results:
        print(_line(case))
    passed = all(case["passed"] for case in results)
    print(
        f"{'PASSED' if passed else 'FAILED'}: bound (1 + {TOLERANCE:g}) C, and for the others "
        f"{max(case['others_allowed'] for case in results):g} C"
    )
    if settings.json:
        if settings.json.exists():
            say(f"{settings.json} is replaced")
        write_json(settings.json, {"passed": passed, "tolerance": TOLERANCE, "cases": results})
    return EXIT_OK if passed else EXIT_FAILED


def _all_cases(settings: Settings) -> list[tuple[dict, Moves]]:
    """The tiny model's cases, and the wide model's."""
    results = _tiny_cases(settings, DTYPES[0])
    for dtype, threads in itertools.product(DTYPES, THREADS):
        facts = {"model": "576 features", "dtype": dtype, "threads": threads}
        results.append((facts, replay_wide(dtype, threads)))
    return results


def _tiny_cases(settings: Settings, dtype: str) -> list[tuple[dict, Moves]]:
    cases = list(itertools.product(STYLES, (False, True), CLIP_NORMS))
    return [
        (
            {
                "prompt_style": style,
                "gradient_checkpointing": checkpointing,
                "clip_norm": clip_norm,
                "processes": processes,
            },
            moves,
        )
        for processes in (1, 2)
        for (style, checkpointing, clip_norm), moves in zip(
            cases, replay(cases, settings.examples, processes, settings.unit, dtype)
        )
    ]


def _one_model(settings: Settings) -> list[tuple[dict, Moves]]:
    dtype, device = settings.dtype or DTYPES[0], settings.device or "cpu"
    threads = settings.threads or 1
    if settings.model:
        moves = replay_rows(settings.model, dtype, threads, device=device)
    else:
        moves = replay_wide(dtype, threads, device=device, steps=STEPS)
    name = settings.model or "576 features"
    facts = {"model": name, "dtype": dtype, "device": device, "threads": threads}
    return [(facts, moves)]


def _figures(moves: Moves) -> dict:
    return {
        "largest_move": max(moves.total),
        "examples_clipped": sum(move > 1 - CLIPPED for move in moves.total),
        "left_out": len(moves.total),
        "others_move": max(moves.others),
        "others_allowed": moves.allowed,
        "passed": moves.passed,
    }


def _line(case: dict) -> str:
    if "model" in case:
        device = f" on {case['device']}" if "device" in case else ""
        about = f"{case['model']}, {case['dtype']}{device}, {case['threads']} thread(s)"
    else:
        checkpointing = "on" if case["gradient_checkpointing"] else "off"
        about = (
            f"{case['prompt_style']}, checkpointing {checkpointing}, C {case['clip_norm']:g}, "
            f"{case['processes']} process(es)"
        )
        about += f", {case['dtype']}" if "dtype" in case else ""
    return (
        f"{about}: largest move {case['largest_move']:.8f} C, {case['examples_clipped']} of "
        f"{case['left_out']} rows or persons clipped; "
        f"the others moved by {case['others_move']:.2g} C"
    )


# ------------------------------------------------------------------------ the tiny model


def replay(
    cases: list[Case],
    examples: int,
    processes: int = 1,
    unit: bool = False,
    dtype: str = DTYPES[0],
) -> list[Moves]:
    """How far leaving out one example moves what the optimizer is given, and the others.

    Args:
        cases: what each pair of runs is made with.
        examples: in the data; each is left out in one step.
        unit: whether it is persons of several rows that are counted, left out and protected.
        processes: that share the batches; with more than one they talk through gloo.
        dtype: of the base.

    Returns:
        For each case the moves for every example.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        _save_data(folder, _owners(examples, unit))
        if processes == 1:
            return _replay_in_process(folder, cases, examples, unit, dtype)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (folder, cases, examples, unit, dtype, processes, port)
        # Imports take most of the time: one server has them behind it, for the ranks of all jobs.
        torch.multiprocessing.set_forkserver_preload(["train"])
        torch.multiprocessing.start_processes(
            _rank, arguments, nprocs=processes, start_method="forkserver"
        )
        return [Moves(**moves) for moves in json.loads((folder / RESULTS).read_text())]


def _owners(examples: int, unit: bool) -> np.ndarray:
    return replayed_owners(examples) if unit else np.arange(examples)


def _save_data(folder: Path, owners: np.ndarray) -> None:
    random = np.random.default_rng(0)

    def text() -> str:
        # Half of them are so short that they pass together.
        longest = random.choice([GRID_STEP - 1, LONGEST])
        return _letters(random, random.integers(1, longest))

    for name in DATASETS.values():
        save_rows(folder / name, owners, text)


def _letters(random: np.random.Generator, count: int) -> str:
    return "".join(random.choice(list("abcdef "), count))


def _rank(
    rank: int,
    folder: Path,
    cases: list[Case],
    examples: int,
    unit: bool,
    dtype: str,
    processes: int,
    port: int,
) -> None:
    """One of several processes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    moves = _replay_in_process(folder, cases, examples, unit, dtype)
    if rank == 0:
        write_json(folder / RESULTS, [asdict(each) for each in moves])
    torch.distributed.destroy_process_group()


def _replay_in_process(
    folder: Path, cases: list[Case], examples: int, unit: bool, dtype: str
) -> list[Moves]:
    torch.set_num_threads(1)
    rows, replayed = len(_owners(examples, unit)), ReplayedPersons if unit else Replayed
    more = [f"--dtype={dtype}", *(unit_flags(ROWS_IN_A_STEP) if unit else [])]
    return [
        _moves(
            folder, [*_argv(folder, case, examples), *more], f"{number}", examples, rows, case[-1],
            replayed,
        )
        for number, case in enumerate(cases)
    ]  # fmt: skip


def _argv(folder: Path, case: Case, examples: int) -> list[str]:
    style, checkpointing, clip_norm = case
    return [
        f"--dataset_name={folder / DATASETS[style]}", f"--model_name={folder / 'model'}",
        f"--prompt_style={style}", "--max_seq_len=400", "--perdevice_bs=1", "--lora_dropout=0.1",
        f"--clip={clip_norm}", *_common_flags(examples, examples),
        *(["--gradient_checkpointing"] if checkpointing else []),
    ]  # fmt: skip


def _common_flags(rows: int, steps: int) -> list[str]:
    return [
        "--lr=0.01", "--loss_normalization=tokens", "--eps=1e6", "--delta=1e-5",
        "--noise_multiplier=1", f"--total_bs={rows}", f"--num_epochs={steps}",
        f"--save_steps={steps}", "--insecure_fixed_noise_seed=0",
    ]  # fmt: skip


# ------------------------------------------------------------------------ a wide model


def replay_wide(
    dtype: str,
    threads: int = 1,
    *,
    device: str = "cpu",
    steps: int = WIDE_STEPS,
    changes: Sequence[type[Private]] = (),
    flags: Sequence[str] = (),
    config: dict[str, object] | None = None,
) -> Moves:
    """`replay_rows` of a random model of 576 features.

    Args:
        config: what else its configuration says.
    """
    with tempfile.TemporaryDirectory() as name:
        tiny_model.save_tiny_model(Path(name), **WIDE | (config or {}))
        return replay_rows(
            name, dtype, threads, device=device, steps=steps, changes=changes, flags=flags
        )


def replay_rows(
    model: str,
    dtype: str,
    threads: int = 1,
    *,
    device: str = "cpu",
    steps: int = STEPS,
    changes: Sequence[type[Private]] = (),
    flags: Sequence[str] = (),
) -> Moves:
    """What leaving out one of 64 rows of mixed lengths moves; see `_mixed_rows`.

    Args:
        model: folder or hub id.
        device: "cpu", or "auto" for what training takes.
        steps: rows that are left out.
        changes: see `observe`.
        flags: more of train.py.
    """
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "letters.jsonl", _mixed_rows())
            argv = [
                f"--dataset_name={folder / 'letters.jsonl'}", f"--model_name={model}",
                f"--prompt_style={UNCONDITIONAL}", f"--dtype={dtype}",
                f"--max_seq_len={WIDE_LONGEST + GRID_STEP}", "--perdevice_bs=4",
                f"--clip={WIDE_CLIP_NORM}", *_common_flags(WIDE_ROWS, steps), *flags,
            ]  # fmt: skip
            sizes = (WIDE_ROWS, WIDE_ROWS, WIDE_CLIP_NORM)
            return _moves(folder, argv, "wide", *sizes, Replayed, changes, device)
    finally:
        torch.set_num_threads(kept)


def _mixed_rows() -> list[dict[str, str]]:
    """First those that are left out: one between, the longest, the shortest, one between.

    No other comes near the longest, and short ones have passed before it is left out, so that what
    remembers the longest of all shows; those between stand before others of their microbatch.
    """
    random = np.random.default_rng(0)
    some = random.integers(3, WIDE_LONGEST * 3 // 4, WIDE_ROWS - 4)
    lengths = [WIDE_BETWEEN, WIDE_LONGEST, 1, WIDE_BETWEEN, *some]
    return [{"instruction": _letters(random, length)} for length in lengths]


# ------------------------------------------------------------------------ a pair of runs


class Replayed(PublicSteps):
    """Draws everyone, or all but example k in step k."""

    leaves_out: bool

    def draw(self, step: int) -> np.ndarray:
        everyone = np.arange(self.num_examples)
        return np.delete(everyone, step) if self.leaves_out else everyone


class Recorded(Private):
    """Writes each row's own gradient to a file: float32 [steps, rows, parameters].

    Clipped, as the row adds it to a step's sum; as it is where it is its person's that is clipped.

    Attributes:
        contributions: the file, which is there; the processes of a job share it.
        num_rows: of the data.
    """

    contributions: Path
    num_rows: int

    def begin(self, step: int, rank: int) -> None:
        super().begin(step, rank)
        self._step = step

    def add(self, total: torch.Tensor) -> torch.Tensor:
        size, plan = total.numel(), self.plan
        gradients = [
            self.gradients.of_example(place)[:size].cpu() for place in range(len(self._captured))
        ]
        norms = super().add(total)
        factors = torch.ones(len(gradients))
        if plan.unit_sampling is None:
            factors = clip_factors(norms, plan.clip_norm, plan.clip_function).cpu()
        with self.contributions.open("r+b") as file:
            for row, gradient, factor in zip(self._captured.tolist(), gradients, factors):
                clipped = torch.where(factor > 0, factor * gradient, 0.0).numpy()
                file.seek((self._step * self.num_rows + row) * clipped.nbytes)
                file.write(clipped.tobytes())
        return norms


def _moves(
    folder: Path,
    argv: list[str],
    job: str,
    examples: int,
    rows: int,
    clip_norm: float,
    replayed: type[PublicSteps],
    changes: Sequence[type[Private]] = (),
    device: str = "cpu",
) -> Moves:
    """What leaving out example k in step k moves in the run of `argv`.

    Args:
        examples: that are counted: rows, or the persons whose they are.
        replayed: who is drawn.
    """
    files = [folder / f"{job}-{leaves_out}.float32" for leaves_out in (False, True)]
    pair: list[Observation] = []
    for file in files:
        file.touch()
        more = [f"--output_dir={folder}", f"--job_sess={file.stem}"]
        pair.append(
            observe(
                [*argv, *more],
                *changes,
                Recorded,
                replayed,
                device=device,
                leaves_out=bool(len(pair)),
                contributions=file,
                num_rows=rows,
            )
        )
    whole, without_one = pair
    moved = np.array(whole.clipped_sums) - np.array(without_one.clipped_sums)
    # Released were equal vectors: what differs in the updates came past the mechanism.
    moved_past = np.array(whole.updates) - np.array(without_one.updates)
    total = np.linalg.norm(moved, axis=1) + examples * np.linalg.norm(moved_past, axis=1)
    for file in files:
        # Who was drawn and did not take part added zero.
        os.truncate(file, len(moved) * rows * moved.shape[1] * np.float32().nbytes)
    others = [
        float(np.linalg.norm(_others(files, step, batches, rows, moved.shape[1])))
        for step, batches in enumerate(zip(whole.batches, without_one.batches))
    ]
    allowed = 0.0 if device == "cpu" else rows * _reported(whole.numerics)
    return Moves((total / clip_norm).tolist(), [length / clip_norm for length in others], allowed)


def _others(
    files: list[Path], step: int, batches: tuple[np.ndarray, np.ndarray], rows: int, size: int
) -> np.ndarray:
    """The move [size] of the clipped gradients of all who are in both batches of a step."""
    moved = np.zeros(size)
    for row in np.intersect1d(*batches):
        offset = (step * rows + int(row)) * size * np.float32().nbytes
        first, second = (np.fromfile(file, np.float32, size, offset=offset) for file in files)
        moved += first.astype(np.float64) - second
    return moved


def _reported(numerics: str) -> float:
    """How far a row's gradient may move, over its norm, by the words of a run's report."""
    found = re.search(r"by up to (\S+) of its norm", numerics)
    return float(found[1]) if found else 0.0


if __name__ == "__main__":
    run_cli(main)
