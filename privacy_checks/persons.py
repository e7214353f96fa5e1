"""Persons of several rows, for the replay and the audit: their data, and who of them is drawn."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from privacy_checks.observed_run import PublicSteps
from utils.privacy.mechanism import Private
from utils.secure_random import SecureRandom

COLUMN = "person"
# A person of the replay has 1 to so many rows, of which a step takes at most so many.
MOST_ROWS, ROWS_IN_A_STEP = 6, 4
# Identical rows of a person who is a canary of the audit, of which a step takes so many.
CANARY_ROWS, CANARY_CAP = 4, 3


def unit_flags(max_rows: int, unit_sampling: str = "units") -> list[str]:
    """Flags of `train.py` that make the person the unit."""
    return [
        f"--unit_column={COLUMN}", f"--max_rows_per_unit={max_rows}",
        f"--unit_sampling={unit_sampling}",
    ]  # fmt: skip


def replayed_owners(persons: int) -> np.ndarray:
    """Whose each row of the replay's data is: int64 [rows], one person's between others'."""
    sizes = 1 + np.arange(persons) % MOST_ROWS
    return np.random.default_rng(0).permutation(np.repeat(np.arange(persons), sizes))


def save_rows(file: Path, owners: Iterable[int], text: Callable[[], str]) -> None:
    """Write a data set of a row for each of `owners`; with `text` called twice for each."""
    write_rows(
        file,
        [{"instruction": text(), "answer": text(), COLUMN: f"person {owner}"} for owner in owners],
    )


def write_rows(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write a data set, an object a line."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


class ReplayedPersons(PublicSteps):
    """Draws everybody, or all but person k in step k; who draws whom else changes nobody's rows."""

    leaves_out: bool

    def draw(self, step: int) -> np.ndarray:
        assert self._units is not None
        left_out = step if self.leaves_out else None
        rows = [
            self._units.units.rows_of(
                np.array([person]), SecureRandom.insecure_fixed(step, "rows", person)
            )
            for person in range(self.num_examples)
            if person != left_out
        ]
        return np.concatenate(rows)


class CapIgnored(Private):
    """All rows of a person take part in a step, not at most K of them."""

    def draw(self, step: int) -> np.ndarray:
        assert self._units is not None
        owners = self._units.units.of_row
        taken = np.flatnonzero(np.isin(owners, owners[super().draw(step)]))
        return taken[np.argsort(owners[taken], kind="stable")]


class MeanByRowClip(Private):
    """Every row of a person clipped to the clip norm and added, in place of their clipped mean."""

    def add(self, total: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        norms = self.gradients.add_clipped_sum(total, plan.clip_norm, plan.clip_function)
        return norms[: len(self._captured)]


BREAKS: dict[str, type[Private]] = {
    "cap_ignored": CapIgnored,
    "mean_by_row_clip": MeanByRowClip,
}


def of_persons(batches: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Who is in batches of rows of canaries, and the most rows that a person has in one of them."""
    counts = [np.bincount(rows // CANARY_ROWS) for rows in batches]
    persons = [np.flatnonzero(count) for count in counts]
    return persons, max((int(count.max(initial=0)) for count in counts), default=0)
