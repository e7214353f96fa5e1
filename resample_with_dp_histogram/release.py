"""A DP histogram for release: its flags, its line in the ledger, and what a report says of it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UsageError, say
from utils.command_line.parser import flag, positive_int
from utils.privacy.accounting import ADD_REMOVE, SampledGaussian
from utils.privacy.guarantee import SEVERAL_ROWS, UNIT, for_unit, person
from utils.privacy.ledger import HISTOGRAM_LEDGER_FILE, read_histograms, record_histogram

if TYPE_CHECKING:
    import numpy as np

    from utils.secure_random import SecureRandom

# What no histogram of private rows covers.
NOT_COVERED = [
    "training on the same private data, and other histograms of it: compose them with "
    "python -m privacy_checks.report RUN --histogram LEDGER",
    "text that the embedding model had already seen",
    SEVERAL_ROWS,
    "timing and other side channels of the machine",
]


@dataclass(frozen=True, kw_only=True)
class HistogramSettings:
    """The flags of a DP histogram."""

    histogram_sigma: float = flag(
        "deviation of the noise of every count; the sensitivity is 1",
        10.0,
        group="privacy",
        type=float,
    )
    num_train_examples: int | None = flag(
        "N, public, the same as in training; the number of private rows, or of their units, if "
        "left out",
        group="privacy",
        type=positive_int,
    )
    ledger: Path | None = flag(
        "ledger of all histograms of this private dataset, appended to; "
        f"{HISTOGRAM_LEDGER_FILE} in the folder of what is counted if left out",
        group="privacy",
        type=Path,
    )
    insecure_fixed_noise_seed: int | None = flag(
        "TESTS ONLY: noise from a known seed; no guarantee. Allows --histogram_sigma 0",
        group="privacy",
        type=int,
    )

    @property
    def insecure(self) -> bool:
        """Whether the noise comes from a known seed."""
        return self.insecure_fixed_noise_seed is not None


@dataclass(frozen=True)
class Release:
    """A histogram to come, of which all that can be refused before it is spent has been.

    Attributes:
        num_examples: N, public: of rows, or of units where there is a `unit_column`.
    """

    settings: HistogramSettings
    num_examples: int
    unit_column: str | None
    owner: str | None
    ledger: Path
    random: "SecureRandom"

    @property
    def unit(self) -> str:
        """Whose presence the histogram hides, in words."""
        return UNIT if self.unit_column is None else person(self.unit_column, self.owner)

    def draw(
        self, bins: "np.ndarray", num_bins: int, units: "np.ndarray | None"
    ) -> tuple["np.ndarray", dict]:
        """Put the histogram on record, then count and add noise (see `noisy_histogram`).

        Args:
            bins: int [rows], the bin of each private row.
            units: int64 [rows], whose they are; None where each row is a unit.

        Returns:
            float64 [num_bins], and the path and head of the ledger with this histogram.
        """
        from resample_with_dp_histogram.histogram import noisy_histogram

        head = record_histogram(
            self.ledger,
            num_examples=self.num_examples,
            noise_multiplier=self.settings.histogram_sigma,
            num_bins=num_bins,
            unit_column=self.unit_column,
            owner=self.owner,
            insecure=self.settings.insecure,
        )
        noisy = noisy_histogram(bins, num_bins, self.settings.histogram_sigma, self.random, units)
        return noisy, {"path": str(self.ledger), **head}

    def facts(
        self, num_bins: int, ledger: dict, covered: list[str], not_covered: list[str]
    ) -> dict:
        """What was drawn and what is guaranteed: a JSON-able dict.

        Args:
            ledger: what `draw` returned of it.
            covered, not_covered: what the kind of histogram adds to `NOT_COVERED`.
        """
        from resample_with_dp_histogram.histogram import SENSITIVITY
        from utils.secure_random import grid_spacing

        insecure, sigma = self.settings.insecure, self.settings.histogram_sigma
        return {
            "guarantee": not insecure,
            "why": "the noise came from a known seed (a test)" if insecure else "",
            "unit": self.unit,
            "unit_column": self.unit_column,
            "neighbouring_relation": ADD_REMOVE,
            "mechanism": "Gaussian histogram",
            "noise_multiplier": sigma / SENSITIVITY,
            "sensitivity": SENSITIVITY,
            "num_examples": self.num_examples,
            "num_bins": num_bins,
            "grid_spacing": grid_spacing(sigma) if sigma else None,
            "noise_source": (
                "INSECURE: a fixed seed"
                if insecure
                else "ChaCha20 keyed from the operating system's entropy at every process start"
            ),
            "ledger": ledger,
            "covered": [] if insecure else covered,
            "not_covered": ["everything: treat the output as private data"]
            if insecure
            else for_unit([*not_covered, *NOT_COVERED], self.unit_column),
        }


def prepare_release(
    settings: HistogramSettings,
    folder: Path,
    num_examples: int,
    unit_column: str | None,
    owner: str | None,
) -> Release:
    """Look at the flags and the ledger before anything is spent.

    Args:
        folder: has the ledger where no flag names another.
        num_examples: N, where no flag states it.
        unit_column, owner: what N counts, see `record_histogram`.

    Raises:
        UsageError: see `source_of_noise` and `read_histograms`.
    """
    random = source_of_noise(settings.histogram_sigma, settings.insecure_fixed_noise_seed)
    ledger = settings.ledger or folder / HISTOGRAM_LEDGER_FILE
    num_examples = settings.num_train_examples or num_examples
    read_histograms(ledger, num_examples, unit_column, owner)
    return Release(settings, num_examples, unit_column, owner, ledger, random)


def source_of_noise(sigma: float, insecure_seed: int | None) -> "SecureRandom":
    """The generator of the noise; refuses a noise that no accountant can be trusted with."""
    # It brings torch, and the flags above are read before that.
    from utils.secure_random import SecureRandom

    if not (insecure_seed is not None and sigma == 0):
        try:
            SampledGaussian(1.0, sigma, 1)
        except UsageError as error:
            raise UsageError(
                f"--histogram_sigma {sigma:g} gives no guarantee that can be stated ({error}); "
                "use 10"
            ) from None
    if insecure_seed is None:
        return SecureRandom()
    say("warning: --insecure_fixed_noise_seed: the noise is known, so there is NO guarantee")
    return SecureRandom.insecure_fixed(insecure_seed, "histogram")


def say_spent(report: dict) -> None:
    """Tell what a histogram costs.

    Args:
        report: with `Release.facts`.
    """
    if report["guarantee"]:
        ledger = shlex.quote(report["ledger"]["path"])
        say(
            f"spent: one Gaussian histogram of sigma {report['noise_multiplier']:g}, N "
            f"{report['num_examples']:,}; with training it costs what\n"
            f"  python -m privacy_checks.report RUN --histogram {ledger}\nsays"
        )
    else:
        say(f"NO GUARANTEE: {report['why']}")
