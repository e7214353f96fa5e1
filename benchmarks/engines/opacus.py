"""Opacus, with per-example gradients through hooks or with ghost clipping."""

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from benchmarks.engines import peers
from benchmarks.jobs import Job


class _Criterion:
    """Example losses behind the interface of a loss module."""

    reduction = "sum"

    def __call__(self, logits: torch.Tensor, batch: dict) -> torch.Tensor:
        return peers.example_losses(logits, batch)


def run(job: Job) -> dict:
    """Train for the job's steps; see `peers.measured`."""
    ghost = job.engine == "opacus-ghost"
    options = {"max_grad_norm": peers.CLIP_NORM, "use_ghost_clipping": True} if ghost else {}
    module_type = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    model = module_type(peers.adapted_model(job), loss_reduction="sum", strict=False, **options)
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer_type = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = optimizer_type(
        torch.optim.AdamW(trainable, lr=peers.LEARNING_RATE),
        noise_multiplier=peers.NOISE_MULTIPLIER,
        max_grad_norm=peers.CLIP_NORM,
        expected_batch_size=job.num_examples,
        loss_reduction="sum",
    )
    criterion = _Criterion()
    if ghost:
        criterion = DPLossFastGradientClipping(model, optimizer, criterion, loss_reduction="sum")

    def step(batches: list[dict]) -> None:
        for number, batch in enumerate(batches, start=1):
            optimizer.signal_skip_step(do_skip=number < len(batches))
            loss = criterion(model(**batch).logits, batch)
            (loss if ghost else loss.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    return peers.measured(job, peers.microbatches(job), step)
