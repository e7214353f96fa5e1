"""Dropout whose masks follow the row, and not its place in a microbatch.

torch deals masks by place in the microbatch, so that an example's mask, and with it its gradient,
depends on who else was drawn. Here an entry of a mask is a function of a secret key, step, layer,
row, position and feature, and of nothing else that was drawn. Layers that read one tensor, as
queries, keys and values do, have one mask, that of the first of them.

What follows is a statement on the mixture over keys: the masks of rows are independent and have one
law, so equal masks can be coupled between neighbouring data sets, and by joint convexity of the
hockey-stick divergence the mixture costs no more than a pair of equal masks does. Given the key it
would be false: rows are numbered, and removing one renumbers those after it.
"""

import hashlib
import os

import numpy as np
import torch
from torch import nn

from utils.devices import to_device

# The increment and the multipliers of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers.
_GAMMA, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class RowMasks:
    """What decides the masks of a run: set by whoever makes a pass, read by its dropout layers.

    Attributes:
        key: secret bytes, the same on every process of a job; never written.
        step: the logical step.
        rows: int64 [examples], the rows of the microbatch, by their place in the data set.
        last_dropped: the tensor that was dropped out last in this pass, and what became of it.
    """

    def __init__(self, key: bytes | None = None):
        self.key = key or os.urandom(32)
        self.step = 0
        self.rows = np.zeros(0, dtype=np.int64)

    @property
    def rows(self) -> np.ndarray:
        return self._rows

    @rows.setter
    def rows(self, rows: np.ndarray) -> None:
        self._rows = rows
        # With it goes what a pass that failed has left: its graph holds all that it computed.
        self.last_dropped: tuple[torch.Tensor, torch.Tensor] | None = None

    def seeds(self, layer: int) -> np.ndarray:
        """int64 [examples], a keyed hash of step, layer and row."""
        place = self.step.to_bytes(8, "little") + layer.to_bytes(8, "little")
        hashes = [
            hashlib.blake2b(place + int(row).to_bytes(8, "little"), key=self.key, digest_size=8)
            for row in self.rows
        ]
        return np.frombuffer(b"".join(each.digest() for each in hashes), dtype=np.int64)


class RowDropout(nn.Module):
    """Inverted dropout of [examples, tokens, features] by `RowMasks`.

    Args:
        p: probability of a zero, one for all layers.
        layer: a number of its own.
    """

    def __init__(self, p: float, masks: RowMasks, layer: int):
        super().__init__()
        self.p = p
        self._masks = masks
        self._layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return inputs
        examples, tokens, features = inputs.shape
        if examples != len(self._masks.rows):
            raise RuntimeError(f"{examples} examples pass, masks are of {len(self._masks.rows)}")
        last = self._masks.last_dropped
        if last is None or last[0] is not inputs:
            seeds = to_device(torch.tensor(self._masks.seeds(self._layer)), inputs.device)
            keeps = kept(seeds, tokens, features, self.p)
            last = inputs, torch.where(keeps, inputs * (1 / (1 - self.p)), 0.0)
            self._masks.last_dropped = last
        return last[1]


def kept(seeds: torch.Tensor, tokens: int, features: int, p: float) -> torch.Tensor:
    """Which entries dropout keeps: bool [examples, tokens, features].

    An entry is decided by its seed, position and feature, so a longer mask begins with a shorter
    one, on any device and with any number of threads.

    Args:
        seeds: int64 [examples].
        p: probability of False.
    """
    places = torch.arange(1, tokens * features + 1, device=seeds.device) * _GAMMA
    bits = seeds[:, None] + places
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    bits = _shifted(bits ^ _shifted(bits, 31), 11)  # 53 of them, uniform
    return (bits >= round(p * 2**53)).view(len(seeds), tokens, features)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
