"""The training run as users start it, watched from outside, on a tiny model made on the fly."""

import contextlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.utils.logging import disable_progress_bar

import train
from privacy_checks import tiny_model
from utils.cli import EXIT_OK, stop_handlers_restored
from utils.privacy.mechanism import Private

# Of the tiny model with the default LoRA: 2 layers, 4 projections, r = 8, 64 + 64 features.
NUM_PARAMETERS = 2 * 4 * 8 * (64 + 64)


def save_tiny_model(folder: Path) -> None:
    """Save a random LLaMA (2 layers, hidden 64) and a tokenizer of one token a byte."""
    disable_progress_bar()
    tiny_model.save_tiny_model(folder, hidden_size=64, num_key_value_heads=4)


@dataclass
class Observation:
    """What one training run drew, summed, released and used, step by step.

    Attributes:
        numerics: how far a row's gradient was its own, as the run's report says it.
        batches: int64 arrays, indices of every logical batch; on the main process alone.
        clipped_sums: float64 [parameters], what was to be released.
        released: float64 [parameters], what was.
        updates: float32 [parameters], what the optimizer was given.
    """

    numerics: str = ""
    batches: list[np.ndarray] = field(default_factory=list)
    clipped_sums: list[np.ndarray] = field(default_factory=list)
    released: list[np.ndarray] = field(default_factory=list)
    updates: list[np.ndarray] = field(default_factory=list)


class Watched(Private):
    """The mechanism, or what else comes after this class, and a record of what it does."""

    seen: Observation

    def draw(self, step: int) -> np.ndarray:
        batch = super().draw(step)
        self.seen.batches.append(batch)
        self.seen.numerics = self.numerics
        return batch

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        self.seen.clipped_sums.append(total.double().cpu().numpy())
        released = super().release(total, step)
        self.seen.released.append(released.cpu().numpy().copy())
        return released


class PublicSteps(Private):
    """Releases one public vector: every step starts from parameters that depend on no data."""

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        super().release(total, step)
        generator = torch.Generator().manual_seed(total.numel())
        noise = torch.randn(total.numel(), generator=generator).double()
        return self.divisor * noise.to(total.device)


def observe(
    argv: list[str], *changes: type[Private], device: str = "cpu", **settings: object
) -> Observation:
    """Run `train.main(argv)` to its end in this process and record what it did.

    Args:
        argv: flags of `train.py`, for a DP run on a data set without a validation split.
        changes: subclasses of `Private` that each change a part of it, the outermost first; the
            records see their effect.
        device: "cpu", where a check is the same on a machine with a GPU as on one without, or
            "auto" for what the run would take.
        settings: class attributes of what they make together.

    Raises:
        KeyboardInterrupt: the run was stopped.
    """
    seen = Observation()
    bases: tuple[type, ...] = (Watched, *changes)
    mechanism = type("Observed", bases, {"seen": seen, **settings})

    def record_update(optimizer: torch.optim.Optimizer, *_) -> None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        seen.updates.append(torch.cat([tensor.grad.flatten() for tensor in tensors]).cpu().numpy())

    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(record_update).remove)
        if device == "cpu":
            on_cpu = mock.patch.object(torch.accelerator, "is_available", return_value=False)
            stack.enter_context(on_cpu)
        # The next run in this process needs the process group that the end of this one closes.
        stack.enter_context(mock.patch.object(Accelerator, "end_training"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(stop_handlers_restored())
        if train.main(argv, private=mechanism) != EXIT_OK:
            raise KeyboardInterrupt
    return seen
