"""Choose --max_rows_per_unit by a DP histogram of how many rows the units have.

    python -m resample_with_dp_histogram.rows_per_unit \\
        --dataset_name chatbot_arena_instructions_train180k --unit_column user_id \\
        --ledger embeddings/chatbot_arena/histogram_ledger.jsonl

Counts the units with 1, 2, 3 to 4, 5 to 8, ... and more than 512 rows, adds Gaussian noise to every
count, and prints one number: the smallest of 1, 2, 4, ..., 1,024 that leaves all their rows to the
wanted share of units. A unit is in one bin, so the histogram is one Gaussian mechanism of noise
multiplier --histogram_sigma. It is written to the ledger of the data set's histograms before its
noise is drawn.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, positive_int, read_flags
from utils.texts.units import OWNERS, read_units


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `rows_per_unit`."""

    dataset_name: str = flag("the data set, which is here; its train split is read", required=True)
    unit_column: str = flag("column that says whose a row is, such as user_id", required=True)
    owner: str | None = flag("which owner counts where --unit_column holds lists", choices=OWNERS)
    unowned_rows_are_units: bool = flag(
        "rows without a value in --unit_column are units of their own; they are refused otherwise",
        False,
    )
    share: float = flag("of the units, that are to keep all their rows", 0.95)
    histogram_sigma: float = flag(
        "deviation of the noise of every count; the sensitivity is 1", 10.0, type=float
    )
    num_train_units: int | None = flag(
        "N, public, the same as in training; counted if left out", type=positive_int
    )
    ledger: Path = flag(
        "ledger of all histograms of this private dataset with this unit, appended to",
        required=True,
        type=Path,
    )


answer_early(__name__, Settings, __doc__)

import numpy as np

from resample_with_dp_histogram.histogram import noisy_histogram, project_to_simplex
from resample_with_dp_histogram.release import source_of_noise
from utils.cli import UsageError, run_cli, say
from utils.privacy.ledger import record_histogram

# The highest number of rows of each bin; the last one also has all units with more.
CAPS = 2 ** np.arange(11)


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    if settings.share > 1:
        raise UsageError(f"--share {settings.share:g} is more than 1, all units; use 0.95")
    random = source_of_noise(settings.histogram_sigma, None)
    units = read_units(
        settings.dataset_name,
        settings.unit_column,
        owner=settings.owner,
        unowned_rows_are_units=settings.unowned_rows_are_units,
    )
    bins = bins_of_units(units)
    num_units = settings.num_train_units or len(bins)
    record_histogram(
        settings.ledger,
        num_examples=num_units,
        noise_multiplier=settings.histogram_sigma,
        num_bins=len(CAPS),
        unit_column=settings.unit_column,
        owner=settings.owner,
    )
    noisy = noisy_histogram(bins, len(CAPS), settings.histogram_sigma, random)
    # From here on everything is post-processing.
    cap = smallest_cap(project_to_simplex(noisy, num_units), settings.share)
    say(
        f"about {settings.share:.0%} of the units keep all their rows with --max_rows_per_unit "
        f"{cap}; spent: one Gaussian histogram of sigma {settings.histogram_sigma:g}, in "
        f"{settings.ledger}"
    )
    print(cap)


def bins_of_units(units: np.ndarray) -> np.ndarray:
    """The bin of each unit by its number of rows: int64 [units].

    Args:
        units: int64 [rows], the unit of each row.
    """
    _, sizes = np.unique(units, return_counts=True)
    return np.minimum(np.searchsorted(CAPS, sizes), len(CAPS) - 1)


def smallest_cap(histogram: np.ndarray, share: float) -> int:
    """The lowest of `CAPS` that leaves all their rows to a share of units.

    Args:
        histogram: float64 [bins], at least 0.
    """
    kept = np.cumsum(histogram) / histogram.sum()
    # The last sum is 1 but for rounding.
    return int(CAPS[min(int(np.searchsorted(kept, share)), len(CAPS) - 1)])


if __name__ == "__main__":
    run_cli(main)
