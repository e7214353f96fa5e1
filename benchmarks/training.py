"""Measure DP training: this toolkit against its peers, and against itself without privacy.

    python -m benchmarks.training --json training.json

Each engine trains on one logical batch of real instructions, all of them in it, at the same budget
of padded tokens (perdevice_bs times max_seq_len), without dropout, which not every peer supports:
a whole logical step with noise and optimizer. Engines take turns, each time in a new process; peers
run in an environment of their own, made on the first call. `ours-*` is train.py itself. With a GPU
the same command measures it. `--engines ours-nondp ours-dp --rounds 9` asks for the price of
privacy alone.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.jobs import OURS, PEERS, Job, make_job, measure, summary
from benchmarks.workload import (
    add_workload_arguments,
    padded_tokens,
    prepare,
    set_up,
)
from utils.cli import EXIT_OK, run_cli
from utils.command_line.parser import make_parser
from utils.files import write_json
from utils.texts.prompts import UNCONDITIONAL, training_ids

PLANNED_EXAMPLES = 4096


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    add_workload_arguments(parser, PEERS + OURS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    python, texts = set_up(args)
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder), texts)
        jobs = [make_job(engine, folder, args) for engine in args.engines]
        lengths = jobs[0].lengths()
        many = token_counts(jobs[0], texts[:PLANNED_EXAMPLES])
        results = measure(python, jobs, args.rounds)
        flops = step_flops(jobs[0])
        peak = matmul_peak(jobs[0])
    engines = {engine: summary(engine, lengths, results[engine]) for engine in args.engines}
    print_table(engines, lengths, flops, peak)
    print_planning(many, args)
    if args.json:
        setting = {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "real_tokens": int(lengths.sum()),
            "flops_of_a_step": flops,
            "matmul_peak_flops_per_second": peak,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        write_json(args.json, [row | {"setting": setting} for row in engines.values()])
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


def matmul_peak(job: Job, repeats: int = 5) -> float:
    """FLOP/s of the model's own matrix products on a full microbatch, the best of some tries."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, job.dtype)
    rows = job.perdevice_bs * job.max_seq_len
    flops, seconds = 0, 0.0
    for (d_out, d_in), count in Counter(linear_layers(job).values()).items():
        x = torch.randn(rows, d_in, dtype=dtype, device=device)
        weight = torch.randn(d_out, d_in, dtype=dtype, device=device)
        tries = []
        for _ in range(1 + repeats):
            began = time.perf_counter()
            x @ weight.t()
            if device.type == "cuda":
                torch.cuda.synchronize()
            tries.append(time.perf_counter() - began)
        flops += count * 2 * rows * d_out * d_in
        seconds += count * min(tries[1:])
    return flops / seconds


def print_table(engines: dict[str, dict], lengths: np.ndarray, flops: int, peak: float) -> None:
    """The figures, and the ratios that they are measured for."""
    real = int(lengths.sum())
    print(f"{len(lengths)} instructions, {real:,} real tokens a logical step, "
          f"{flops / 1e9:,.0f} GFLOP; matmul peak {peak / 1e9:,.0f} GFLOP/s")  # fmt: skip
    print(f"{'engine':<16}{'tokens/s':>10}{'from - to':>16}{'processed/real':>16}"
          f"{'peak MiB':>10}{'of matmul peak':>16}")  # fmt: skip
    for name, row in engines.items():
        slowest, fastest = real / max(row["seconds"]), real / min(row["seconds"])
        share = flops / statistics.median(row["seconds"]) / peak
        print(f"{name:<16}{row['real_tokens_per_second']:>10,.0f}"
              f"{f'{slowest:,.0f} - {fastest:,.0f}':>16}{row['processed_over_real']:>16.3f}"
              f"{row['peak_memory_mib']:>10,.0f}{share:>16.2f}")  # fmt: skip
    if "ours-dp" not in engines:
        return
    ours = engines["ours-dp"]["real_tokens_per_second"]
    for name in ("published-loop", "ours-nondp"):
        if name in engines:
            print(f"ours-dp over {name}: {ours / engines[name]['real_tokens_per_second']:.2f}")
    others = [engines[n]["real_tokens_per_second"] for n in PEERS[1:] if n in engines]
    if others:
        print(f"ours-dp over the best other peer: {ours / max(others):.2f}")


def token_counts(job: Job, texts: list[str]) -> np.ndarray:
    """Tokens of every text, as a training example."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    examples = training_ids(tokenizer, UNCONDITIONAL, texts, max_seq_len=job.max_seq_len)
    return np.array([len(ids) for ids, _ in examples])


def print_planning(lengths: np.ndarray, args: argparse.Namespace) -> None:
    """What padding is left in a logical batch of these lengths, and how long cutting it takes."""
    began = time.perf_counter()
    padded = padded_tokens(lengths, args.perdevice_bs * args.max_seq_len)
    seconds = time.perf_counter() - began
    print(f"a logical batch of {len(lengths):,}: processed/real {padded / lengths.sum():.3f}, "
          f"cut in {1000 * seconds:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
