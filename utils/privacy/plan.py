"""The plan that alone decides privacy. No torch.

Generator, sampler, clipping, noise, ledger and report all read one frozen `PrivacyPlan`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from fractions import Fraction

from utils.cli import UsageError
from utils.folders import require_same_settings
from utils.privacy.accounting import (
    ADD_REMOVE,
    SampledGaussian,
    calibrate_noise_multiplier,
    compute_epsilon,
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

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.num_examples

    @property
    def reserved(self) -> list[SampledGaussian]:
        """The mechanisms other than training that the target epsilon pays for."""
        return _histogram(self.reserved_histogram_sigma)

    def events(self, steps: int) -> list[SampledGaussian]:
        """The mechanisms of `steps` logical steps of training."""
        rows = _sampled_rows(self.unit_sampling, self.max_rows_per_unit)
        return [SampledGaussian(self.sampling_rate, self.noise_multiplier, steps, rows)]

    def digest(self) -> str:
        """A hash of every field, which ties ledger and checkpoints to this plan."""
        # Left out where they are None, so that plans from before there were units keep their hash.
        of_unit = ("unit_column", "max_rows_per_unit", "unit_sampling", "owner")
        settings = {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in of_unit
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
) -> tuple[PrivacyPlan, list[str]]:
    """Make the plan of a run; calibrate sigma where it is None.

    Args: see `PrivacyPlan`; steps follow from `num_epochs`, see `num_steps`.

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
    sigma = noise_multiplier
    if sigma is None:
        rate = expected_batch_size / num_examples
        reserved = _histogram(reserved_histogram_sigma)
        rows = _sampled_rows(unit_sampling, max_rows_per_unit)
        sigma = calibrate_noise_multiplier(
            target_epsilon, delta, rate, steps, reserved, ADD_REMOVE, rows
        )
    plan = PrivacyPlan(
        num_examples=num_examples,
        expected_batch_size=expected_batch_size,
        steps=steps,
        clip_norm=clip_norm,
        clip_function=clip_function,
        loss_normalization=loss_normalization,
        noise_multiplier=sigma,
        delta=delta,
        target_epsilon=target_epsilon,
        reserved_histogram_sigma=reserved_histogram_sigma,
        unit_column=unit_column,
        max_rows_per_unit=max_rows_per_unit,
        unit_sampling=unit_sampling,
        owner=owner,
    )
    if noise_multiplier is not None:
        spent = compute_epsilon(plan.events(steps) + plan.reserved, delta).upper
        if spent > target_epsilon:
            raise UsageError(
                f"--noise_multiplier {sigma} gives epsilon {spent:.3f} in {steps} steps, above "
                f"--eps {target_epsilon}; leave it out to have it calibrated"
            )
    return plan, warnings
