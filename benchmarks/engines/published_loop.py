"""The loop of arXiv 2402.13659's published code, written anew from its description.

Hooks keep every LoRA layer's input and multiply it with the output gradient; autograd's own weight
gradients are computed too, and thrown away. Always with gradient checkpointing.
"""

import torch

from benchmarks.engines import peers
from benchmarks.jobs import Job


def run(job: Job) -> dict:
    """Train for the job's steps; see `peers.measured`."""
    model = peers.adapted_model(job)
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            module.register_forward_hook(_keep_input)
    optimizer = torch.optim.AdamW(trainable, lr=peers.LEARNING_RATE)

    def step(batches: list[dict]) -> None:
        sums = [torch.zeros_like(tensor) for tensor in trainable]
        for batch in batches:
            optimizer.zero_grad()
            peers.example_losses(model(**batch).logits, batch).sum().backward()
            layers = [tensor.per_example.flatten(1).norm(dim=1) for tensor in trainable]
            factors = (peers.CLIP_NORM / torch.stack(layers).norm(dim=0)).clamp(max=1)
            for total, tensor in zip(sums, trainable):
                total += torch.einsum("n,noi->oi", factors, tensor.per_example)
        for total, tensor in zip(sums, trainable):
            noise = torch.randn_like(total) * peers.NOISE_MULTIPLIER * peers.CLIP_NORM
            tensor.grad = (total + noise) / job.num_examples
        optimizer.step()

    return peers.measured(job, peers.microbatches(job), step)


def _keep_input(module: torch.nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
    if not output.requires_grad:
        return
    kept = inputs[0].detach()

    def keep_gradient(gradient: torch.Tensor) -> None:
        module.weight.per_example = torch.einsum("nto,nti->noi", gradient, kept)

    output.register_hook(keep_gradient)
