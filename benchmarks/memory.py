"""Measure the memory of DP training, this toolkit's against its own without privacy.

    python -m benchmarks.memory --json memory.json

Four cases: rank 8 on the attention layers and rank 64 on all linear ones; a logical batch of real
instructions of all lengths, and one microbatch of 100 short examples. Peak memory is that of a
process beyond its interpreter and libraries, model included; on a GPU, what torch allocated at
most. Engines take turns, each time in a new process. `--engines` adds the peers.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.jobs import OURS, make_job, measure, summary
from benchmarks.workload import (
    ATTENTION,
    add_workload_arguments,
    prepare,
    set_up,
)
from utils.cli import EXIT_OK, run_cli, say
from utils.command_line.parser import make_parser
from utils.files import write_json

ADAPTERS = {"r 8, attention": (8, ATTENTION), "r 64, all linear": (64, ["all-linear"])}
SHORT_EXAMPLES, SHORT_CHARACTERS = 100, 60


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    add_workload_arguments(parser, OURS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    python, texts = set_up(args)
    batches = {
        "all lengths": texts[: args.num_examples],
        f"{SHORT_EXAMPLES} short": [text[:SHORT_CHARACTERS] for text in texts[:SHORT_EXAMPLES]],
    }
    rows = []
    print(f"{'case':<32}{'engine':<16}{'peak MiB':>10}{'over ours-nondp':>17}")
    for length, batch in batches.items():
        args.num_examples = len(batch)
        with tempfile.TemporaryDirectory() as folder:
            prepare(args, Path(folder), batch)
            for adapter, (args.lora_r, args.target_modules) in ADAPTERS.items():
                case = f"{adapter}; {length}"
                say(case)
                jobs = [make_job(engine, folder, args) for engine in args.engines]
                results = measure(python, jobs, args.rounds)
                lengths = jobs[0].lengths()
                found = {name: summary(name, lengths, results[name]) for name in args.engines}
                plain = found.get("ours-nondp", {}).get("peak_memory_mib")
                for name, row in found.items():
                    peak = row["peak_memory_mib"]
                    ratio = f"{peak / plain:.3f}" if plain else ""
                    print(f"{case:<32}{name:<16}{peak:>10,.0f}{ratio:>17}", flush=True)
                    rows.append(row | {"case": case})
    if args.json:
        write_json(args.json, rows)
    return EXIT_OK


if __name__ == "__main__":
    run_cli(main)
