"""Frozen parts of a model, compiled: norms, and MLPs or attention in which no adapter sits.

What is compiled are forward functions of modules that hold no adapter, so that hooks and
per-example gradients stay outside. One compilation is for all layers and all shapes: nothing of a
private row, not its length either, comes into the compiler's files.
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

BACKEND = "inductor"
# Variants of one part: with a gradient and without, of one row and of several, in training or not.
# Beyond torch's own limit of 8 it would quietly go on without compiling.
MOST_VARIANTS = 64


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The largest modules with weights that hold no adapter and are more than one matrix product.

    Those with quantised weights are left out, whose kernels are their own.
    """
    if isinstance(module, LoraLayer | nn.Linear | nn.Embedding | Conv1D):
        return []
    inner = list(module.modules())
    if any(isinstance(each, LoraLayer) for each in inner):
        return [part for child in module.children() for part in frozen_parts(child)]
    quantised = any(isinstance(m, nn.Linear) and type(m) is not nn.Linear for m in inner)
    has_weights = any(True for _ in module.parameters())
    return [module] if has_weights and not quantised else []


def compile_parts(parts: Sequence[nn.Module]) -> None:
    """Let modules compile their forward functions when they are used, until `undo`."""
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    for part in parts:
        compiled = torch.compile(part.forward, dynamic=True, backend=BACKEND)
        setattr(part, "forward", compiled)  # noqa: B010 - mypy lets no method be assigned to


def undo(parts: Sequence[nn.Module]) -> None:
    """Let modules compute as they did before `compile_parts`."""
    for part in parts:
        del part.forward
