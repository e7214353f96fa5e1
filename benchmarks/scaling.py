"""Does a second process pay? Tokens per second of DP training, the same cores shared by more.

    python -m benchmarks.scaling

Runs train.py through `accelerate launch` on the CPU: with one process that has all cores of this
machine, and with several that share them, by turns. Reports real tokens per second, the median
over rounds and steps, the first step of each run left out. Fixed draws, so that all runs see the
same batches. Exit code 1 if several processes reach less than 0.95 of one.
"""

from dataclasses import dataclass, replace

from benchmarks import figures
from utils.command_line.parser import answer_early, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags."""

    model_name: str = flag("a folder or hub id", "data/quickstart_model")
    dataset_name: str = flag("instructions", "quickstart_instructions")
    processes: int = flag("compared with one", 2)
    total_bs: int = flag("examples in a step", 128)
    steps: int = flag("of each run", 4)
    rounds: int = flag("runs of each kind", 2)
    quick: bool = flag("a tiny random model, one round", False)


answer_early(__name__, Settings, __doc__)

import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.figures import markdown
from benchmarks.measuring import by_turns, output_of
from privacy_checks.tiny_model import save_tiny_model
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli
from utils.command_line.launch import launch_command, with_this_python
from utils.texts.data_sets import count_train_examples, tried_places

LEAST = 0.95


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        if settings.quick:
            save_tiny_model(Path(folder))
            settings = replace(settings, model_name=folder, rounds=1)
        measure = partial(tokens_per_second, settings)
        runs = by_turns([1, settings.processes], measure, settings.rounds)
    speeds = {processes: sum(found, []) for processes, found in runs.items()}
    medians = {processes: statistics.median(found) for processes, found in speeds.items()}
    cores = len(os.sched_getaffinity(0))
    rows = [
        [f"{processes}", f"{max(1, cores // processes)}", f"{median:.1f}",
         f"{median / medians[1]:.3f}"]
        for processes, median in medians.items()
    ]  # fmt: skip
    headings = ["processes", "threads each", "real tokens/s", "of one process"]
    print(markdown(headings, rows))
    settings.write({"cores": cores, "tokens_per_second": speeds, "medians": medians})
    return EXIT_OK if medians[settings.processes] >= LEAST * medians[1] else EXIT_FAILED


def tokens_per_second(settings: Settings, processes: int) -> list[float]:
    """Real tokens per second of every step of one run but the first."""
    count = count_train_examples(settings.dataset_name)
    if count is None:
        raise UsageError(tried_places(settings.dataset_name))
    # Threads are train.py's to share out.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--dataset_name={settings.dataset_name}", f"--model_name={settings.model_name}",
            f"--output_dir={folder}", "--job_sess=job", "--prompt_style=uncond_generation",
            "--eps=8", "--delta=1e-5", "--clip=1", "--loss_normalization=tokens",
            "--max_seq_len=128", "--perdevice_bs=4", f"--total_bs={settings.total_bs}",
            "--no_eval_at_start", "--max_eval_examples=1", "--insecure_fixed_noise_seed=0",
            # Half a step more than asked for, against rounding down.
            f"--num_epochs={(settings.steps + 0.5) * settings.total_bs / count}",
        ]  # fmt: skip
        command = with_this_python(launch_command("train.py", flags, processes))
        output_of(command, f"the run of {processes} process(es)", environment)
        lines = Path(folder, "job", "private", "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "seconds" in record]
    return [step["real_tokens"] / step["seconds"] for step in steps[1:]]


if __name__ == "__main__":
    run_cli(main)
