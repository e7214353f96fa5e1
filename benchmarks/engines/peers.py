"""What the engines that are compared with share: model, microbatches, loss, stopwatch.

Every one of them computes a logical batch as its own documentation has it: in microbatches of
`perdevice_bs` random examples, padded to the longest of these, with an attention mask and the
model's own logits.
"""

from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.jobs import Job
from benchmarks.measuring import device, seconds_of
from utils.models.memory import PeakMemory

NOISE_MULTIPLIER, CLIP_NORM, LEARNING_RATE = 1.0, 1.0, 1e-4


def adapted_model(job: Job) -> PeftModel:
    """The job's model with LoRA adapters in float32, in training mode."""
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    base.config.use_cache = False
    config = LoraConfig(
        task_type="CAUSAL_LM", r=job.lora_r, lora_alpha=2 * job.lora_r, lora_dropout=0.0,
        target_modules=job.targets if len(job.targets) > 1 else job.targets[0],
    )  # fmt: skip
    return get_peft_model(base, config).to(device()).train()


def microbatches(job: Job) -> list[dict[str, torch.Tensor]]:
    """The logical batch in random order: `input_ids` and `attention_mask`, [examples, tokens]."""
    examples = job.examples()
    order = np.random.default_rng(0).permutation(len(examples))
    batches = []
    for start in range(0, len(order), job.perdevice_bs):
        part = [torch.tensor(examples[i]) for i in order[start : start + job.perdevice_bs]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(example) for example in part])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batches.append({"input_ids": ids.to(device()), "attention_mask": mask.long().to(device())})
    return batches


def example_losses(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each example's mean loss over its own tokens [examples]."""
    mask = batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    return (losses * mask).sum(dim=1) / mask.sum(dim=1)


def measured(job: Job, batches: list[dict], step: Callable[[list[dict]], None]) -> dict:
    """Time `step` on the logical batch, after a small one that warms up, and its peak of memory."""
    with PeakMemory(device()) as memory:
        step(batches[:2])
        seconds = [seconds_of(lambda: step(batches)) for _ in range(job.steps)]
    processed = sum(batch["input_ids"].numel() for batch in batches)
    return {"seconds": seconds, "processed_tokens": processed, "peak_memory": memory.peak}
