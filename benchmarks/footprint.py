"""What of a LLaMA's DP training fits on a GPU, with which flags: computed from shapes, not run.

    python -m benchmarks.footprint --model 13b --lora_r 8 --max_seq_len 1024 --card 80

GiB of a base in bfloat16, 8 or 4 bits (embeddings and head stay in bfloat16), of the adapters, the
optimizer's moments and the float32 sum of a step, of a chunk of logits, and of one sequence of
--max_seq_len tokens: its activations, its per-example gradients, of which the larger counts, since
these come while those go, and what one layer works with. For each card the most such sequences at
once, for --perdevice_bs. utils/models/footprint.py has the formulas.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks import figures
from utils.cli import EXIT_OK, run_cli
from utils.command_line.parser import flag, read_flags
from utils.models.footprint import ATTENTION, CARDS, FLOAT, GIB, LLAMA, Training

QUANTISATIONS = {"none": None, "8bit": 8, "4bit": 4}
HEADINGS = ["model", "bits", "checkpointing", "base", "adapters", "optimizer", "sum", "logits",
            "activations", "gradients", "layer"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags of the table."""

    model: list[str] = flag("sizes of LLaMA 2", list(LLAMA), nargs="+", choices=tuple(LLAMA))
    card: list[int] = flag("GiB", list(CARDS), nargs="+", type=int, choices=CARDS)
    quantisation: list[str] = flag(
        "of the base", list(QUANTISATIONS), nargs="+", choices=tuple(QUANTISATIONS)
    )
    lora_r: int = flag("rank", 8)
    target_modules: list[str] = flag("or all-linear", list(ATTENTION), nargs="+")
    max_seq_len: int = flag("tokens of the longest sequence", 1024)


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    rows = [figures_of(settings, *run) for run in runs(settings)]
    print(table(settings, rows))
    settings.write(rows)
    return EXIT_OK


def runs(settings: Settings) -> Iterator[tuple[str, Training]]:
    """Every run of the table, with the name of its model."""
    kinds = product(settings.model, settings.quantisation, (False, True))
    for model, quantisation, checkpointing in kinds:
        yield model, Training(
            architecture=LLAMA[model],
            rank=settings.lora_r,
            max_seq_len=settings.max_seq_len,
            target_modules=tuple(settings.target_modules),
            bits=QUANTISATIONS[quantisation],
            gradient_checkpointing=checkpointing,
        )  # fmt: skip


def figures_of(settings: Settings, model: str, run: Training) -> dict:
    """Bytes of each part of a run, and the most sequences by card."""
    tokens = settings.max_seq_len
    return {
        "model": model,
        "bits": run.bits or 16,
        "checkpointing": "yes" if run.gradient_checkpointing else "no",
        "base": run.weights,
        "adapters": FLOAT * run.trained,
        "optimizer": 2 * FLOAT * run.trained,
        "sum": FLOAT * run.trained,
        "logits": run.logits,
        "activations": tokens * run.row.held,
        "gradients": run.row.kept(tokens),
        "layer": tokens * run.row.working,
        "most_sequences": {str(card): run.most_sequences(card) for card in settings.card},
    }


def table(settings: Settings, rows: list[dict]) -> str:
    """In Markdown, GiB; the last columns have the most sequences, or that not one fits."""
    cells = [
        [
            *(str(row[name]) for name in HEADINGS[:3]),
            *(f"{row[name] / GIB:.2f}" for name in HEADINGS[3:]),
            *(str(most or "none") for most in row["most_sequences"].values()),
        ]
        for row in rows
    ]
    return figures.markdown([*HEADINGS, *(f"on {card} GiB" for card in settings.card)], cells)


if __name__ == "__main__":
    run_cli(main)
