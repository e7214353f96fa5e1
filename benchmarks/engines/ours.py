"""This toolkit: `train.py` itself, with and without privacy."""

import json
import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import train
from benchmarks.jobs import Job
from benchmarks.workload import padded_tokens
from utils.models.memory import PeakMemory
from utils.privacy.mechanism import Mechanism, Plain, Private

Kind = TypeVar("Kind", bound=Mechanism)


def run(job: Job) -> dict:
    """Train for the job's steps, with every example in every batch; timed by the run itself."""
    output = Path(job.folder) / f"outputs-{os.getpid()}"
    private = ["--eps=100", "--delta=1e-4", "--noise_multiplier=10", "--clip=1"]
    argv = [
        f"--dataset_name={job.dataset}", f"--model_name={job.model}", "--job_sess=job",
        f"--output_dir={output}", "--prompt_style=uncond_generation", "--no_eval_at_start",
        f"--max_seq_len={job.max_seq_len}", f"--perdevice_bs={job.perdevice_bs}",
        f"--total_bs={job.num_examples}", f"--num_epochs={1 + job.steps}", "--lr=1e-4",
        f"--dtype={job.dtype}", f"--lora_r={job.lora_r}", f"--lora_alpha={2 * job.lora_r}",
        "--lora_dropout=0", "--loss_normalization=tokens", "--save_steps=1000000",
        "--target_modules", *job.targets, *(private if job.engine == "ours-dp" else ["--eps=-1"]),
    ]  # fmt: skip
    memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    private_kind = measured(Private, memory, job.steps)
    if train.main(argv, private_kind, measured(Plain, memory, job.steps)):
        raise RuntimeError("the run did not finish")
    lines = (output / "job" / "private" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return {
        "seconds": seconds[1:],
        "processed_tokens": padded_tokens(job.lengths(), job.perdevice_bs * job.max_seq_len),
        "peak_memory": memory.peak,
    }


def measured(kind: type[Kind], memory: PeakMemory, last_step: int) -> type[Kind]:
    """A mechanism that watches memory from the first draw to the last release.

    Not before and after: an accountant takes memory too.
    """

    def draw(self: Kind, step: int) -> np.ndarray:
        if step == 0:
            memory.__enter__()
        return kind.draw(self, step)

    def release(self: Kind, total: torch.Tensor, step: int) -> torch.Tensor:
        released = kind.release(self, total, step)
        if step == last_step:
            memory.__exit__()
        return released

    return type(f"Measured{kind.__name__}", (kind,), {"draw": draw, "release": release})
