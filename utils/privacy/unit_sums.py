"""Units of several rows: drawn whole, their rows' mean gradient clipped as one.

The unit is a person, a conversation, or whatever a column of the data tells apart; what a unit adds
to the sum of a step follows from its own rows, the parameters and the step.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from utils.dp_utils import PerExampleGradients, clip_factors
from utils.privacy.plan import UNITS_AT_ONCE
from utils.secure_random import SecureRandom


@dataclass(frozen=True)
class Units:
    """Whose each row is, and how many rows of one unit a step takes.

    Attributes:
        of_row: int64 [rows], units numbered from 0 without a gap.
        max_rows: K, public.
    """

    of_row: np.ndarray
    max_rows: int

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.bincount(self.of_row)

    @cached_property
    def _rows(self) -> np.ndarray:
        """Rows in the order of their units."""
        return np.argsort(self.of_row, kind="stable")

    def __len__(self) -> int:
        return len(self._sizes)

    def fingerprint(self) -> str:
        """A hash of whose each row is, made of private data."""
        return hashlib.sha256(self.of_row.data).hexdigest()

    def rows_of(self, units: np.ndarray, random: SecureRandom) -> np.ndarray:
        """At most K rows of each unit, any K with equal probability.

        Args:
            units: int64, ascending.

        Returns:
            int64 indices of rows, unit after unit.
        """
        sizes = self._sizes[units]
        starts = (np.cumsum(self._sizes) - self._sizes)[units]
        firsts = np.cumsum(sizes) - sizes
        within = np.arange(sizes.sum()) - np.repeat(firsts, sizes)
        rows = self._rows[np.repeat(starts, sizes) + within]
        # The K smallest of independent uniform numbers.
        order = np.lexsort((random.uint64(len(rows)), np.repeat(np.arange(len(units)), sizes)))
        return rows[order][within < self.max_rows]


@dataclass
class UnitSums:
    """Mean gradients of the units of a step, each clipped and added once all its rows have passed.

    Guarantee: a unit adds a vector of l2 norm at most `clip_norm`, whatever other units there are;
    one with a gradient that is not finite adds exactly zero. Rows of a unit may pass in several
    microbatches, all of them of one process; between them one float32 vector of all trainable
    parameters is kept for it.

    Attributes:
        units: of the data.
        counts: int64 [units], rows in this step of each.
    """

    units: Units
    counts: np.ndarray = field(init=False)
    _left: dict[int, int] = field(init=False)
    _slots: dict[int, int] = field(init=False)
    _sums: torch.Tensor | None = field(init=False, default=None)

    def expect(self, rows: np.ndarray, num_ranks: int) -> list[np.ndarray]:
        """Begin a step in which these rows pass, on all processes together.

        Args:
            rows: int64, unit after unit.

        Returns:
            The rows of at most `UNITS_AT_ONCE` units at a time.
        """
        owners = self.units.of_row[rows]
        self.counts = np.bincount(owners, minlength=len(self.units))
        self._left, self._slots = {}, {}
        if self._sums is not None:
            self._sums.zero_()
        firsts = np.flatnonzero(np.diff(owners, prepend=-1))
        most = max(1, min(UNITS_AT_ONCE, -(-len(firsts) // num_ranks)))
        return np.split(rows, firsts[most::most]) if len(rows) else []

    def add(
        self,
        gradients: PerExampleGradients,
        examples: np.ndarray,
        total: torch.Tensor,
        clip_norm: float,
        clip_function: str,
    ) -> torch.Tensor:
        """Take the captured gradients of `examples`, and add units that are whole to `total`.

        Args:
            total: float32 [parameters].

        Returns:
            float32, the norm before clipping of each unit that became whole. Computed from private
            data without noise: for `private/` alone.
        """
        owners = self.units.of_row[examples].tolist()
        # In the order of the rows, which a unit's own rows decide among themselves.
        sums = self._sums_of(owners, total)
        gradients.add_examples(sums, [self._slots[owner] for owner in owners])
        norms = []
        for owner in owners:
            self._left[owner] -= 1
            if not self._left[owner]:
                norms.append(self._finish(owner, total, clip_norm, clip_function))
        return torch.stack(norms) if norms else total.new_zeros(0)

    def require_whole(self) -> None:
        """Raise a RuntimeError if a unit has not all of its rows."""
        if self._slots:
            raise RuntimeError(f"{len(self._slots)} units have not all of their rows in the sum")

    def _sums_of(self, owners: list[int], total: torch.Tensor) -> torch.Tensor:
        """The kept sums, with room for every owner: float32 [slots, parameters]."""
        if self._sums is None:
            self._sums = total.new_zeros(UNITS_AT_ONCE, len(total))
        for owner in owners:
            if owner not in self._slots:
                used = set(self._slots.values())
                free = next(slot for slot in range(len(used) + 1) if slot not in used)
                if free == len(self._sums):
                    self._sums = torch.cat([self._sums, torch.zeros_like(self._sums)])
                self._slots[owner] = free
                self._left[owner] = int(self.counts[owner])
        return self._sums

    def _finish(
        self, owner: int, total: torch.Tensor, clip_norm: float, clip_function: str
    ) -> torch.Tensor:
        assert self._sums is not None
        mean = self._sums[self._slots.pop(owner)]
        mean /= int(self.counts[owner])
        # In float32 the norm of ten million numbers is off by 0.05% and more on a CPU.
        norm = torch.linalg.vector_norm(mean, dtype=torch.float64).float()
        if torch.isfinite(norm):
            total.add_(mean * clip_factors(norm, clip_norm, clip_function))
        mean.zero_()
        return norm
