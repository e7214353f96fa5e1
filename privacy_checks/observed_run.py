"""The training run as users start it, watched from outside, on a tiny model made on the fly."""

import contextlib
import io
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

import train
from privacy_checks import tiny_model
from utils.cli import EXIT_OK

# Of the tiny model with the default LoRA: 2 layers, 4 projections, r = 8, 64 + 64 features.
NUM_PARAMETERS = 2 * 4 * 8 * (64 + 64)


def save_tiny_model(folder: Path) -> None:
    """Save a random LLaMA (2 layers, hidden 64) and a tokenizer of one token a byte."""
    disable_progress_bar()
    tiny_model.save_tiny_model(folder, hidden_size=64, num_key_value_heads=4)


@dataclass
class Observation:
    """What one training run drew, summed and used, step by step.

    Attributes:
        batches: int64 arrays, indices of every logical batch.
        clipped_sums: float64 [parameters], what noise was added to; on the main process alone.
        gradients: float64 [parameters], what the optimizer was given: noised sum over total_bs.
    """

    batches: list[np.ndarray] = field(default_factory=list)
    clipped_sums: list[np.ndarray] = field(default_factory=list)
    gradients: list[np.ndarray] = field(default_factory=list)


def observe(argv: list[str], **replacements: Callable) -> Observation:
    """Run `train.main(argv)` to its end in this process and record what it did.

    Args:
        argv: flags of `train.py`, for a data set without a validation split.
        replacements: functions that stand in for names in `train`; the records see their effect.

    Raises:
        KeyboardInterrupt: the run was stopped.
    """
    seen = Observation()
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(train, name, replacement))
        cut, add, assign = train.cut_microbatches, train.add_noise, train.assign_gradient

        def cut_microbatches(indices, *rest):
            seen.batches.append(indices)
            return cut(indices, *rest)

        def add_noise(clipped_sum, *rest):
            seen.clipped_sums.append(clipped_sum.double().numpy())
            return add(clipped_sum, *rest)

        def assign_gradient(parameters, gradient):
            seen.gradients.append(gradient.numpy().copy())
            assign(parameters, gradient)

        for recorder in (cut_microbatches, add_noise, assign_gradient):
            stack.enter_context(mock.patch.object(train, recorder.__name__, recorder))
        # On the CPU, where the audit of a machine with a GPU is the same as of one without.
        on_cpu = mock.patch.object(torch.accelerator, "is_available", return_value=False)
        stack.enter_context(on_cpu)
        # The next run in this process needs the process group that the end of this one closes.
        stack.enter_context(mock.patch.object(train.Accelerator, "end_training"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(signal_handlers_restored())
        if train.main(argv) != EXIT_OK:
            raise KeyboardInterrupt
    return seen


@contextlib.contextmanager
def signal_handlers_restored() -> Iterator[None]:
    """Give back the handlers that a run in this process takes for its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
