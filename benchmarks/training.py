"""Measure DP training: this toolkit against its peers, and against itself without privacy.

    python -m benchmarks.training --json training.json

Each engine trains on one logical batch of real instructions, all of them in it, at the same budget
of padded tokens (perdevice_bs times max_seq_len), without dropout, which not every peer supports:
a whole logical step with noise and optimizer. Engines take turns, each time in a new process; peers
run in an environment of their own, made on the first call. `ours-*` is train.py itself. With a GPU
the same command measures it. `--engines ours-nondp ours-dp --rounds 9` asks for the price of
privacy alone.
"""

from benchmarks import workload
from benchmarks.jobs import OURS, PEERS
from utils.command_line.parser import answer_early

answer_early(__name__, workload.Settings, __doc__, engines=list(PEERS + OURS))


import statistics
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.figures import aligned
from benchmarks.jobs import Job
from benchmarks.measuring import device, seconds_of
from utils.cli import EXIT_OK, run_cli
from utils.runs.batching import Shapes
from utils.texts.prompts import UNCONDITIONAL, training_ids

PLANNED_EXAMPLES = 4096
MATMUL_TRIES = 5


def main(argv: list[str] | None = None) -> int:
    settings = workload.read_settings(__doc__, PEERS + OURS, argv)
    texts = workload.instructions(settings.dataset_name)
    with tempfile.TemporaryDirectory() as folder:
        workload.prepare(settings, Path(folder), texts)
        jobs = workload.make_jobs(settings, folder)
        lengths = jobs[0].lengths()
        many = token_counts(jobs[0], texts[:PLANNED_EXAMPLES])
        engines = workload.measure(jobs, settings.rounds)
        flops, peak = step_flops(jobs[0]), matmul_peak(jobs[0])
    real = int(lengths.sum())
    print(f"{len(lengths)} instructions, {real:,} real tokens a logical step, "
          f"{flops / 1e9:,.0f} GFLOP; matmul peak {peak / 1e9:,.0f} GFLOP/s")  # fmt: skip
    print(table(engines, real, flops / peak))
    max_seq_len = settings.max_seq_len
    print_planning(many, max_seq_len, settings.perdevice_bs * max_seq_len)
    setting = {
        "arguments": settings.on_record(),
        "real_tokens": real,
        "flops_of_a_step": flops,
        "matmul_peak_flops_per_second": peak,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    settings.write([row | {"setting": setting} for row in engines.values()])
    return EXIT_OK


def step_flops(job: Job) -> int:
    """FLOPs that the real tokens of a logical step need, with LoRA on a frozen base.

    A frozen matrix costs 2 FLOPs a weight and token forward and 2 backward (to its input; no
    weight gradient); a trained one 6; causal attention 2 · d · length² forward in each layer,
    twice that backward. Nothing recomputed or padded counts.
    """
    config = AutoConfig.from_pretrained(job.model)
    lengths = job.lengths()
    each_token = 0
    for name, (d_out, d_in) in linear_layers(job).items():
        # The first layer's q, k and v need no gradient to their input: below are embeddings.
        needs_input_gradient = not name.startswith("model.layers.0.self_attn") or "o_proj" in name
        each_token += (4 if needs_input_gradient else 2) * d_out * d_in
        adapted = "all-linear" in job.targets and "lm_head" not in name
        if adapted or name.split(".")[-1] in job.targets:
            each_token += 6 * job.lora_r * (d_out + d_in)
    attention = 6 * config.num_hidden_layers * config.hidden_size * int((lengths**2).sum())
    return each_token * int(lengths.sum()) + attention


def linear_layers(job: Job) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer of the base, the head included, by name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def matmul_peak(job: Job) -> float:
    """FLOP/s of the model's own matrix products on a full microbatch, the best of some tries."""
    rows = job.perdevice_bs * job.max_seq_len
    options = {"dtype": getattr(torch, job.dtype), "device": device()}
    flops, seconds = 0, 0.0
    for (d_out, d_in), count in Counter(linear_layers(job).values()).items():
        x, weight = torch.randn(rows, d_in, **options), torch.randn(d_out, d_in, **options)
        product = partial(torch.matmul, x, weight.t())
        _, *tries = [seconds_of(product) for _ in range(1 + MATMUL_TRIES)]
        flops += count * 2 * rows * d_out * d_in
        seconds += count * min(tries)
    return flops / seconds


def table(engines: dict[str, dict], real: int, least: float) -> str:
    """The figures, and the ratios that they are measured for.

    Args:
        real: real tokens of a logical step.
        least: seconds that the step would take at the matmul peak.
    """
    rows = [["engine", "tokens/s", "from - to", "processed/real", "peak MiB", "of matmul peak"]]
    for name, row in engines.items():
        slowest, fastest = real / max(row["seconds"]), real / min(row["seconds"])
        rows.append([
            name, f"{row['real_tokens_per_second']:,.0f}", f"{slowest:,.0f} - {fastest:,.0f}",
            f"{row['processed_over_real']:.3f}", f"{row['peak_memory_mib']:,.0f}",
            f"{least / statistics.median(row['seconds']):.2f}",
        ])  # fmt: skip
    lines = [aligned(rows)]
    speeds = {name: row["real_tokens_per_second"] for name, row in engines.items()}
    if "ours-dp" in speeds:
        ours = speeds["ours-dp"]
        for name in ("published-loop", "ours-nondp"):
            if name in speeds:
                lines.append(f"ours-dp over {name}: {ours / speeds[name]:.2f}")
        if others := [speeds[name] for name in PEERS[1:] if name in speeds]:
            lines.append(f"ours-dp over the best other peer: {ours / max(others):.2f}")
    return "\n".join(lines)


def token_counts(job: Job, texts: list[str]) -> np.ndarray:
    """Tokens of every text, as a training example."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    examples = training_ids(tokenizer, UNCONDITIONAL, texts, max_seq_len=job.max_seq_len)
    return np.array([len(ids) for ids, _ in examples])


def print_planning(lengths: np.ndarray, max_seq_len: int, token_budget: int) -> None:
    """What padding is left in a logical batch of these lengths, and how long cutting it takes."""
    seconds = seconds_of(lambda: workload.padded_tokens(lengths, token_budget))
    kinds = {
        "without privacy": None,
        "with it, any number of rows": Shapes(max_seq_len, token_budget, None),
        "a fixed number": Shapes(max_seq_len, token_budget, len(lengths) // 4),
    }
    ratios = ", ".join(
        f"{workload.padded_tokens(lengths, token_budget, shapes) / lengths.sum():.3f} {kind}"
        for kind, shapes in kinds.items()
    )
    print(f"a logical batch of {len(lengths):,}, on a CPU: processed/real {ratios}; "
          f"cut in {1000 * seconds:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
