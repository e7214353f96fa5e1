"""The plan that alone decides privacy. No torch.

Generator, sampler, clipping, noise, ledger and report all read one frozen `PrivacyPlan`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from utils.cli import UsageError
from utils.folders import require_same_settings
from utils.privacy.accounting import (
    ADD_REMOVE,
    MAX_DELTA,
    MAX_NOISE,
    MAX_STEPS,
    MIN_DELTA,
    MIN_NOISE,
    MIN_RATE,
    SampledGaussian,
    calibrate_noise_multiplier,
    compute_epsilon,
)
from utils.privacy.banded import (
    WITHOUT_BANDS,
    band_coefficients,
    best_bands,
    participations,
    require_bands,
    require_sound,
)

# What a step draws where a unit may have several rows.
UNITS, ROWS = "units", "rows"
# Units whose sums are kept at once while their rows pass, by a process.
UNITS_AT_ONCE = 32


def _sampled_rows(unit_sampling: str | None, max_rows_per_unit: int | None) -> int:
    """Draws that may find a unit: of each of its rows where rows are drawn, else one."""
    return max_rows_per_unit or 1 if unit_sampling == ROWS else 1


def _histogram(sigma: float | None) -> list[SampledGaussian]:
    """A Gaussian histogram of sensitivity 1, as an accountant composes it."""
    return [] if sigma is None else [SampledGaussian(1.0, sigma, 1)]


def num_steps(num_epochs: float, num_examples: int, batch_size: int) -> int:
    """T = floor(num_epochs · N / total_bs), at least 1, in exact arithmetic."""
    return max(1, int(Fraction(str(num_epochs)) * num_examples / batch_size))


@dataclass(frozen=True)
class PrivacyPlan:
    """All that decides the guarantee of a DP training run; every field is a public constant.

    Attributes:
        num_examples: N, of what is sampled: units with UNITS, else rows.
        expected_batch_size: total_bs; the sampling rate is total_bs / N, and the divisor total_bs.
        steps: T, logical steps.
        clip_norm: C.
        noise_multiplier: sigma; the noise has deviation sigma · C per coordinate.
        delta, target_epsilon: the guarantee aimed at.
        reserved_histogram_sigma: noise of a histogram that the target also pays for, or None.
        unit_column: the column that says whose a row is; None where every row is a unit of its own.
        max_rows_per_unit: K, rows of a unit that may take part, in a step with UNITS or at all with
            ROWS; None without a column.
        unit_sampling: UNITS: a unit is drawn, and the mean gradient of its rows is clipped as one;
            ROWS: rows are drawn and clipped one by one. None without a column.
        owner: which of several owners of a row counts, `first` or `last`; None where a row has one.
        band_coefficients: the first column of the matrix that correlates noise over steps, see
            `banded`; None for white noise.

    Raises:
        UsageError: the accounting does not hold for the coefficients.
    """

    num_examples: int
    expected_batch_size: int
    steps: int
    clip_norm: float
    clip_function: str
    loss_normalization: str
    noise_multiplier: float
    delta: float
    target_epsilon: float
    reserved_histogram_sigma: float | None = None
    neighbouring_relation: str = ADD_REMOVE
    sampler: str = "poisson"
    unit_column: str | None = None
    max_rows_per_unit: int | None = None
    unit_sampling: str | None = None
    owner: str | None = None
    band_coefficients: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.band_coefficients is not None:
            # A ledger has a list.
            object.__setattr__(self, "band_coefficients", tuple(self.band_coefficients))
            require_sound(self.coefficients)
            require_bands(self.bands, self.num_examples, self.expected_batch_size, self.steps)
            if _sampled_rows(self.unit_sampling, self.max_rows_per_unit) > 1:
                raise UsageError(
                    f"band_coefficients with unit_sampling {ROWS} and max_rows_per_unit "
                    f"{self.max_rows_per_unit}: rows of a unit may be of several groups, which "
                    f"nothing accounts for; use unit_sampling {UNITS}, or 1 row"
                )

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.num_examples

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The first column of C, that of white noise included."""
        return self.band_coefficients or WITHOUT_BANDS

    @property
    def bands(self) -> int:
        """b: who takes part in a step does so in none of the b - 1 next ones; 1 for white noise."""
        return len(self.coefficients)

    def participations(self, steps: Iterable[int]) -> int:
        """In how many of these steps one unit may take part, see `banded.participations`."""
        return participations(steps, self.bands)

    @property
    def reserved(self) -> list[SampledGaussian]:
        """The mechanisms other than training that the target epsilon pays for."""
        return _histogram(self.reserved_histogram_sigma)

    def events(self, times: int) -> list[SampledGaussian]:
        """The mechanisms of training, of whose steps a unit may take part in `times`.

        Args:
            times: of `participations`; with white noise the number of steps.
        """
        rows = _sampled_rows(self.unit_sampling, self.max_rows_per_unit)
        rate = self.bands * self.expected_batch_size / self.num_examples
        return [SampledGaussian(rate, self.noise_multiplier, times, rows)]

    def as_json(self) -> dict:
        """Every field, as a ledger that is read again has it."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """A hash of every field, which ties ledger and checkpoints to this plan."""
        # Left out where they are None, so that plans of earlier versions keep their hash.
        newer = (
            "unit_column", "max_rows_per_unit", "unit_sampling", "owner", "band_coefficients",
        )  # fmt: skip
        settings = {
            name: value
            for name, value in self.as_json().items()
            if value is not None or name not in newer
        }
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def require_same(self, other: "PrivacyPlan", where: str) -> None:
        """Raise a UsageError that names every field in which `other` differs."""
        require_same_settings(
            asdict(other),
            asdict(self),
            f"{where} holds a run whose privacy plan has",
            "use that value or another --job_sess",
        )


def make_plan(
    num_examples: int,
    *,
    expected_batch_size: int,
    num_epochs: float,
    clip_norm: float,
    clip_function: str,
    loss_normalization: str,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float | None = None,
    reserved_histogram_sigma: float | None = None,
    unit_column: str | None = None,
    max_rows_per_unit: int | None = None,
    unit_sampling: str | None = None,
    owner: str | None = None,
    bands: int | str = 1,
    coefficients: Sequence[float] | None = None,
) -> tuple[PrivacyPlan, list[str]]:
    """Make the plan of a run; calibrate sigma where it is None.

    Args: see `PrivacyPlan`; steps follow from `num_epochs`, see `num_steps`.
        bands: of correlated noise; "auto" for `best_bands`, 1 for white noise.
        coefficients: the band coefficients of a run that is continued; computed if None.

    Returns:
        The plan, and warnings, one line each.

    Raises:
        UsageError: a value that gives no or a meaningless guarantee.
    """
    warnings = []
    if delta >= 1 / num_examples:
        raise UsageError(
            f"--delta {delta}: must be below 1/N = {1 / num_examples:.2e}, or a mechanism "
            f"that publishes one example may pass; use {1 / (100 * num_examples):.0e}"
        )
    if delta > 1 / (10 * num_examples):
        warnings.append(f"--delta {delta} is above 1/(10 N) = {1 / (10 * num_examples):.1e}")
    steps = num_steps(num_epochs, num_examples, expected_batch_size)
    if steps > MAX_STEPS:
        raise UsageError(
            f"--num_epochs {num_epochs:g} with --total_bs {expected_batch_size} takes more than "
            f"{MAX_STEPS:,} steps, the most that is accounted for; use a larger --total_bs, or "
            "fewer --num_epochs"
        )
    for name, value, least, most in (
        ("delta", delta, MIN_DELTA, MAX_DELTA),
        ("noise_multiplier", noise_multiplier, MIN_NOISE, MAX_NOISE),
        ("reserve_histogram_sigma", reserved_histogram_sigma, MIN_NOISE, MAX_NOISE),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} {value:g}: must be between {least:g} and {most:g}")
    reserved = _histogram(reserved_histogram_sigma)
    if coefficients is not None:
        bands = len(coefficients)
    elif bands == "auto":
        bands = best_bands(
            target_epsilon, delta, num_examples, expected_batch_size, steps, reserved
        )
    require_bands(int(bands), num_examples, expected_batch_size, steps)
    if int(bands) * expected_batch_size / num_examples < MIN_RATE:
        raise UsageError(
            f"--total_bs {expected_batch_size} of {num_examples:,}: a sampling rate below "
            f"{MIN_RATE:g} is not accounted for; use "
            f"--total_bs {math.ceil(Fraction(str(MIN_RATE)) * num_examples / int(bands))} or more"
        )
    if coefficients is None and bands != 1:
        coefficients = band_coefficients(int(bands), steps)
    plan = PrivacyPlan(
        num_examples=num_examples,
        expected_batch_size=expected_batch_size,
        steps=steps,
        clip_norm=clip_norm,
        clip_function=clip_function,
        loss_normalization=loss_normalization,
        # Until it is calibrated, any.
        noise_multiplier=1.0 if noise_multiplier is None else noise_multiplier,
        delta=delta,
        target_epsilon=target_epsilon,
        reserved_histogram_sigma=reserved_histogram_sigma,
        unit_column=unit_column,
        max_rows_per_unit=max_rows_per_unit,
        unit_sampling=unit_sampling,
        owner=owner,
        band_coefficients=None if coefficients is None else tuple(coefficients),
    )
    (event,) = plan.events(plan.participations(range(steps)))
    if noise_multiplier is None:
        sigma = calibrate_noise_multiplier(
            target_epsilon, delta, event.sampling_rate, event.steps, reserved, ADD_REMOVE,
            event.rows_per_unit,
        )  # fmt: skip
        plan = replace(plan, noise_multiplier=sigma)
    else:
        spent = compute_epsilon([event, *reserved], delta).upper
        if spent > target_epsilon:
            raise UsageError(
                f"--noise_multiplier {noise_multiplier} gives epsilon {spent:.3f} in {steps} "
                f"steps, above --eps {target_epsilon}; leave it out to have it calibrated"
            )
    return plan, warnings
