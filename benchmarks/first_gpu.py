"""What `benchmarks/first_gpu.sh` measures with, and the table that it ends with.

    python -m benchmarks.first_gpu --prepare
    python -m benchmarks.first_gpu

The first writes a random LLaMA and texts of made-up words to first_gpu/, the second prints what the
steps between have written there: what a row's absence moved of the others, over the clip norm;
the share of the peak of the model's own matrix products; memory by the length of rows; the price of
privacy; tokens per second of sampling.
"""

from dataclasses import dataclass

from utils.command_line.parser import answer_early, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    prepare: bool = flag("write model and texts, and measure nothing", False)


answer_early(__name__, Settings, __doc__)

import json
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.environments import ROOT
from benchmarks.figures import aligned
from privacy_checks.tiny_model import byte_tokenizer, tiny_llama
from utils.cli import EXIT_OK, run_cli

FOLDER = ROOT / "first_gpu"
MODEL: dict[str, int] = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 22, "vocab_size": 32000,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
# Tokens of rows that are all of one length; a letter is a token.
ROW_LENGTHS = (16, 128, 1024)
ROWS = 1024
MISSING = "-"


def main(argv: list[str] | None = None) -> int:
    if read_flags(Settings, __doc__, argv).prepare:
        prepare(FOLDER, MODEL)
    else:
        print(aligned([("figure", "value"), *figures(FOLDER)]))
    return EXIT_OK


def prepare(folder: Path, model: dict[str, int]) -> None:
    """Write `model/`, `mixed.jsonl` and `rows-TOKENS.jsonl`.

    Args:
        model: the configuration of the random LLaMA.
    """
    tiny_llama(**model).to(torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    # As instructions are: most are short, and a few fill the longest sequence.
    mixed = np.minimum(random.lognormal(4.3, 1.0, ROWS), max(ROW_LENGTHS)).astype(int)
    lengths = {"mixed": mixed} | {f"rows-{n}": np.full(ROWS, n) for n in ROW_LENGTHS}
    for name, of_row in lengths.items():
        texts = ("".join(random.choice(list("abcdef "), max(1, n - 1))) for n in of_row)
        lines = "".join(json.dumps({"instruction": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)


def figures(folder: Path) -> list[tuple[str, str]]:
    """Name and value of every figure; of those that no step has written, that it is missing."""

    def read(name: str):
        file = folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    rows = []
    for dtype in ("bfloat16", "float32"):
        found = read(f"exactness-{dtype}")
        moved = found and max(case["others_move"] for case in found["cases"])
        rows.append((f"moved of other rows, {dtype}", _shown(moved, ".2g", " C")))
    engines = {row["engine"]: row for row in read("training") or []}
    for name in ("ours-nondp", "ours-dp"):
        rows.append((f"share of matmul peak, {name}", _shown(_share(engines.get(name)), ".2f")))
    speeds = [row["real_tokens_per_second"] for row in engines.values()]
    ratio = speeds[1] / speeds[0] if len(speeds) == 2 else None
    rows.append(("speed, ours-dp over ours-nondp", _shown(ratio, ".2f")))
    for tokens in ROW_LENGTHS:
        found = read(f"memory-{tokens}")
        peak = found and found[0]["peak_memory_mib"]
        rows.append((f"peak memory, rows of {tokens} tokens", _shown(peak, ",.0f", " MiB")))
    sampled = (read("sampling") or {"engines": {}})["engines"]
    for name in ("one at a time", "static", "continuous"):
        rate = sampled.get(name, {}).get("tokens_per_second")
        rows.append((f"sampling, {name}", _shown(rate, ",.0f", " tokens/s")))
    return rows


def _share(row: dict | None) -> float | None:
    """What a step would take at the peak, over what it took."""
    if row is None:
        return None
    setting = row["setting"]
    least = setting["flops_of_a_step"] / setting["matmul_peak_flops_per_second"]
    return least / statistics.median(row["seconds"])


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


if __name__ == "__main__":
    run_cli(main)
