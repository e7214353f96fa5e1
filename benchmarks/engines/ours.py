"""This toolkit: `train.py` itself, with and without privacy."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import train
from benchmarks.jobs import Job
from utils.models.memory import PeakMemory
from utils.privacy.mechanism import Mechanism, Plain, Private

Kind = TypeVar("Kind", bound=Mechanism)


def run(job: Job) -> dict:
    """Train for the job's steps, with every example in every batch; timed by the run itself."""
    output = Path(job.folder) / f"outputs-{os.getpid()}"
    private = ["--eps=100", "--delta=1e-4", "--noise_multiplier=10", "--clip=1"]
    drawn, of_units = job.num_examples, job.engine == "ours-dp" and job.rows_per_unit > 1
    if of_units:
        private += ["--unit_column=user_id", f"--max_rows_per_unit={job.rows_per_unit}"]
        drawn = -(-drawn // job.rows_per_unit)
    argv = [
        f"--dataset_name={job.dataset}", f"--model_name={job.model}", "--job_sess=job",
        f"--output_dir={output}", "--prompt_style=uncond_generation", "--no_eval_at_start",
        f"--max_seq_len={job.max_seq_len}", f"--perdevice_bs={job.perdevice_bs}",
        f"--total_bs={drawn}", f"--num_epochs={1 + job.steps}", "--lr=1e-4",
        f"--dtype={job.dtype}", f"--lora_r={job.lora_r}", f"--lora_alpha={2 * job.lora_r}",
        "--lora_dropout=0", "--loss_normalization=tokens", "--save_steps=1000000",
        "--target_modules", *job.targets, *(private if job.engine == "ours-dp" else ["--eps=-1"]),
    ]  # fmt: skip
    memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokens: list[int] = []
    private_kind = measured(Private, memory, tokens, job.steps)
    plain_kind = measured(Plain, memory, tokens, job.steps)
    with count_tokens(tokens):
        if train.main(argv, private_kind, plain_kind):
            raise RuntimeError("the run did not finish")
    lines = (output / "job" / "private" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return {
        "seconds": seconds[1:],
        "processed_tokens": tokens[-1],
        "peak_memory": memory.peak,
    }


@contextmanager
def count_tokens(tokens: list[int]) -> Iterator[None]:
    """Add to the last of `tokens` what passes through the model's embedding in the block."""

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if tokens and isinstance(module, nn.Embedding):
            tokens[-1] += inputs[0].numel()

    hook = register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def measured(kind: type[Kind], memory: PeakMemory, tokens: list[int], last_step: int) -> type[Kind]:
    """A mechanism that watches memory from the first draw to the last release.

    Not before and after: an accountant takes memory too.

    Args:
        tokens: gets a zero at every step.
    """

    def draw(self: Kind, step: int) -> np.ndarray:
        tokens.append(0)
        if step == 0:
            memory.__enter__()
        return kind.draw(self, step)

    def release(self: Kind, total: torch.Tensor, step: int) -> torch.Tensor:
        released = kind.release(self, total, step)
        if step == last_step:
            memory.__exit__()
        return released

    return type(f"Measured{kind.__name__}", (kind,), {"draw": draw, "release": release})
