"""Does a second process pay? Tokens per second of DP training, the same cores shared by more.

    python -m benchmarks.scaling

Runs train.py through `accelerate launch` on the CPU: with one process that has all cores of this
machine, and with several that share them, by turns. Reports real tokens per second, the median
over rounds and steps, the first step of each run left out. Fixed draws, so that all runs see the
same batches. Exit code 1 if several processes reach less than 0.95 of one.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from privacy_checks.tiny_model import save_tiny_model
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.launch import launch_command, with_this_python
from utils.command_line.parser import make_parser, positive_int
from utils.files import write_json
from utils.texts.data_sets import count_train_examples, tried_places

LEAST = 0.95


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--model_name", default="data/quickstart_model", help="a folder or hub id")
    parser.add_argument("--dataset_name", default="quickstart_instructions", help="instructions")
    parser.add_argument("--processes", type=positive_int, default=2, help="compared with one")
    parser.add_argument("--total_bs", type=positive_int, default=128, help="examples in a step")
    parser.add_argument("--steps", type=positive_int, default=4, help="of each run")
    parser.add_argument("--rounds", type=positive_int, default=2, help="runs of each kind")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one round")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write this")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    count = count_train_examples(args.dataset_name)
    if count is None:
        raise UsageError(tried_places(args.dataset_name))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.quick:
            args.model_name, args.rounds = str(folder / "model"), 1
            save_tiny_model(folder / "model")
        speeds: dict[int, list[float]] = {1: [], args.processes: []}
        for round_number in range(args.rounds):
            for processes, measured in speeds.items():
                job = f"{round_number}-{processes}"
                say(f"round {round_number + 1} of {args.rounds}, {processes} process(es)")
                measured += tokens_per_second(args, count, folder, job, processes)
    medians = {processes: statistics.median(measured) for processes, measured in speeds.items()}
    cores = len(os.sched_getaffinity(0))
    print("| processes | threads each | real tokens/s | of one process |")
    print("| ---: | ---: | ---: | ---: |")
    for processes, median in medians.items():
        threads = max(1, cores // processes)
        print(f"| {processes} | {threads} | {median:.1f} | {median / medians[1]:.3f} |")
    if args.json:
        write_json(args.json, {"cores": cores, "tokens_per_second": speeds, "medians": medians})
    return EXIT_OK if medians[args.processes] >= LEAST * medians[1] else EXIT_FAILED


def tokens_per_second(
    args: argparse.Namespace, count: int, folder: Path, job: str, processes: int
) -> list[float]:
    """Real tokens per second of every step of one run but the first."""
    flags = [
        f"--dataset_name={args.dataset_name}", f"--model_name={args.model_name}",
        f"--output_dir={folder}", f"--job_sess={job}", "--prompt_style=uncond_generation",
        "--eps=8", "--delta=1e-5", "--clip=1", "--loss_normalization=tokens", "--max_seq_len=128",
        "--perdevice_bs=4", f"--total_bs={args.total_bs}", "--no_eval_at_start",
        "--max_eval_examples=1", "--insecure_fixed_noise_seed=0",
        # Half a step more than asked for, against rounding down.
        f"--num_epochs={(args.steps + 0.5) * args.total_bs / count}",
    ]  # fmt: skip
    command = launch_command("train.py", flags, processes)
    launcher = with_this_python(command)
    # Threads are train.py's to share out.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"the run failed: {done.stderr[-2000:]}")
    lines = (folder / job / "private" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "seconds" in record]
    return [step["real_tokens"] / step["seconds"] for step in steps[1:]]


if __name__ == "__main__":
    run_cli(main)
