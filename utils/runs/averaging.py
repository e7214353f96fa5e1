"""Averages of the values that training passes through: computed from them alone.

Noise of single steps averages out, and with a guarantee the average has the same one, since it is
post-processing of what was released.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import nn


class Average:
    """The mean over steps so far of every trainable tensor.

    Exponential, "ema:B": mean_t is the sum of (1 - B) B^(t - i) theta_i over i = 1..t, divided by
    1 - B^t, so that it is not drawn to where training began. Of the end, "tail:F": the plain mean
    of the last ceil(F · T) steps.

    Args:
        rule: "ema:B" or "tail:F", as `command_line.parser.average_rule` lets pass.
        parameters: the trainable tensors by name.
        steps: T.
    """

    def __init__(self, rule: str, parameters: dict[str, nn.Parameter], steps: int):
        kind, _, share = rule.partition(":")
        self._parameters = parameters
        self._decay = float(share) if kind == "ema" else 1.0
        self._first = steps - math.ceil(Fraction(share) * steps) if kind == "tail" else 0
        self._count = 0
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as step `step` (from 1) left them."""
        if step <= self._first:
            return
        self._count += 1
        decay, count = self._decay, self._count
        weight = 1 / count if decay == 1 else (1 - decay) / (1 - decay**count)
        for name, mean in self._mean.items():
            mean.lerp_(self._parameters[name], weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in place of the parameters, in the block."""
        own = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        _copy(self._mean, self._parameters)
        try:
            yield
        finally:
            _copy(own, self._parameters)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"count": self._count, "mean": self._mean}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self._count = state["count"]
        _copy(state["mean"], self._mean)


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
