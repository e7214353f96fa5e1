"""Measure the memory of DP training, this toolkit's against its own without privacy.

    python -m benchmarks.memory --json memory.json

Four cases: rank 8 on the attention layers and rank 64 on all linear ones; a logical batch of real
instructions of all lengths, and one microbatch of 100 short examples. Peak memory is that of a
process beyond its interpreter and libraries, model included; on a GPU, what torch allocated at
most. Engines take turns, each time in a new process. `--engines` adds the peers.
"""

from benchmarks import workload
from benchmarks.jobs import OURS
from utils.command_line.parser import answer_early

answer_early(__name__, workload.Settings, __doc__, engines=list(OURS))


import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import aligned
from utils.cli import EXIT_OK, run_cli, say

ADAPTERS = {"r 8, attention": (8, workload.ATTENTION), "r 64, all linear": (64, ["all-linear"])}
SHORT_EXAMPLES, SHORT_CHARACTERS = 100, 60


def main(argv: list[str] | None = None) -> int:
    settings = workload.read_settings(__doc__, OURS, argv)
    texts = workload.instructions(settings.dataset_name)
    batches = {
        "all lengths": texts[: settings.num_examples],
        f"{SHORT_EXAMPLES} short": [text[:SHORT_CHARACTERS] for text in texts[:SHORT_EXAMPLES]],
    }
    rows, table = [], [["case", "engine", "peak MiB", "over ours-nondp"]]
    for length, batch in batches.items():
        settings = replace(settings, num_examples=len(batch))
        with tempfile.TemporaryDirectory() as folder:
            workload.prepare(settings, Path(folder), batch)
            for adapter, (rank, modules) in ADAPTERS.items():
                case = f"{adapter}; {length}"
                say(case)
                adapted = replace(settings, lora_r=rank, target_modules=modules)
                found = workload.measure(workload.make_jobs(adapted, folder), settings.rounds)
                plain = found.get("ours-nondp", {}).get("peak_memory_mib")
                for name, row in found.items():
                    peak = row["peak_memory_mib"]
                    ratio = f"{peak / plain:.3f}" if plain else ""
                    table.append([case, name, f"{peak:,.0f}", ratio])
                    rows.append(row | {"case": case})
                    say("  ".join(table[-1]))
    print(aligned(table))
    settings.write(rows)
    return EXIT_OK


if __name__ == "__main__":
    run_cli(main)
