"""Opake: per-example gradients through torch.func, microbatch by microbatch."""

import torch
from opake.dpsgd.clipping import clipped_grad
from opake.dpsgd.noise import gaussian_noise
from opake.functional import make_functional
from opake.patches import apply_model_patches, apply_runtime_patches
from opake.pytree import merge
from opake.random import key

from benchmarks.engines import peers
from benchmarks.jobs import Job


def run(job: Job) -> dict:
    """Train for the job's steps; see `peers.measured`."""
    apply_runtime_patches()
    model = peers.adapted_model(job)
    apply_model_patches(model)
    functional, trainable, frozen = make_functional(model, partition_trainable=True)

    def loss(parameters: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids[None], "attention_mask": mask[None]}
        logits = functional(merge(frozen, parameters), **batch).logits
        return peers.example_losses(logits, batch).sum()

    gradient, clip_state = clipped_grad(loss, batch_argnums=(1, 2), clipping_norm=peers.CLIP_NORM)
    noise, noise_state = gaussian_noise(noise_multiplier=peers.NOISE_MULTIPLIER, key=key(0))
    optimizer = torch.optim.AdamW(trainable.values(), lr=peers.LEARNING_RATE)

    def step(batches: list[dict]) -> None:
        nonlocal clip_state, noise_state
        total = None
        for batch in batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            clipped, clip_state = gradient(trainable, ids, mask, state=clip_state)
            if total is None:
                total = clipped
            else:
                for name, tensor in clipped.pytree.items():
                    total.pytree[name].add_(tensor)
        noised, noise_state = noise(total, noise_state)
        with torch.no_grad():
            for name, tensor in trainable.items():
                tensor.grad = noised.pytree[name] / job.num_examples
        optimizer.step()

    return peers.measured(job, peers.microbatches(job), step)
