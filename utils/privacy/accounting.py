"""Epsilon, delta and noise calibration for Poisson-sampled Gaussian mechanisms. No torch.

Every epsilon and delta to be claimed is an upper bound: where dp-accounting's PLD cannot be trusted
its Renyi DP takes over, and where neither can an error is raised. The PRV accountant, which shares
no code with them, is the second opinion. The accountants are imported where they are used, so that
importing this module costs nothing.
"""

import math
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache, lru_cache, reduce
from importlib.metadata import version
from typing import TYPE_CHECKING

from utils.cli import UsageError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from utils.privacy.mixtures import MixtureStep

ADD_REMOVE = "add_or_remove_one"
REPLACE = "replace_one"

MIN_NOISE, MAX_NOISE = 0.3, 100.0
MIN_RATE, MAX_STEPS = 1e-5, 100_000
MIN_DELTA, MAX_DELTA = 1e-12, 1e-2
MAX_ROWS = 256
NOISE_DECIMALS = 3
# Rows of one person for which reports give epsilon where the unit is a row.
GROUP_SIZES = (1, 2, 5, 10, 20)
CLOSED_FORM = "closed form"
CLOSED_FORM_OF_ALL = "closed form, as if every row took part in every step"

PRV_EPS_ERROR = 0.01
PRV_DELTA_ERROR = 1e-3  # as a share of delta
# A million long doubles compose in about 4 s and 100 MB; the cost grows a little faster.
PRV_MAX_CELLS = 1_000_000
# Cells of one step's, and of the whole composition's, privacy loss distribution.
PLD_STEP_CELLS, PLD_CELLS = 200_000, 4_000_000
# Widest interval between losses, and the least number of intervals in a step's deviation: to claim
# with, to search with, and to compare with, which asks for up to 0.3% more epsilon.
PLD_FINE, PLD_COARSE, PLD_ROUGH = (5e-4, 30), (2e-3, 10), (1e-2, 4)
DOUBLE_ROUNDING = 2.0**-52


@dataclass(frozen=True)
class SampledGaussian:
    """A Gaussian mechanism on a Poisson sample, repeated: what an accountant composes.

    Attributes:
        sampling_rate: q, 1e-5 to 1; 1 is a plain Gaussian mechanism, such as a noisy histogram.
        noise_multiplier: sigma, 0.3 to 100: noise deviation over the l2 bound of one example.
        steps: T, 0 to 100,000; nothing is spent by none.
        rows_per_unit: K, 1 to 256: examples that a neighbour has more or less. Each is sampled by
            itself, so a step moves by the bounds of Binomial(K, q) of them.

    Raises:
        UsageError: a value is outside its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    rows_per_unit: int = 1

    def __post_init__(self):
        _require("sampling rate", self.sampling_rate, MIN_RATE, 1.0)
        _require("noise multiplier", self.noise_multiplier, MIN_NOISE, MAX_NOISE)
        _require("steps", self.steps, 0, MAX_STEPS)
        _require("rows of a unit", self.rows_per_unit, 1, MAX_ROWS)
        if self.steps != int(self.steps):
            raise UsageError(f"steps {self.steps}: must be a whole number")


@dataclass(frozen=True)
class EpsilonClaim:
    """The mechanism is (upper, delta)-differentially private.

    Attributes:
        upper: the guarantee.
        accountant: name and version of what produced `upper`.
    """

    upper: float
    accountant: str


@dataclass(frozen=True)
class EpsilonBounds(EpsilonClaim):
    """What is known about epsilon; `upper` is the guarantee.

    Attributes:
        lower: epsilon is not below this, but for rounding; 0 where no accountant gives a bound.
        estimate: best guess.
        pld, prv: upper bounds by PLD and by the PRV accountant alone; None where there is none.
        probability_of_more: that the privacy loss exceeds `upper`, and so that somebody's odds
            change by more than e^upper; it is above delta. None where it is not known.
    """

    lower: float
    estimate: float
    pld: float | None
    prv: float | None
    probability_of_more: float | None


def compute_epsilon(
    events: Sequence[SampledGaussian], delta: float, relation: str = ADD_REMOVE
) -> EpsilonClaim:
    """Epsilon to claim for the composition of `events` at `delta`.

    The closed form where every event has q = 1 (Balle and Wang 2018, theorem 8). Else a pessimistic
    PLD (Doroshenko et al. 2022), which follows adding and removing apart; where delta is so small
    that rounding in its FFT could decide the answer, Renyi DP (Mironov 2017).

    Replacing one example moves a clipped sum by up to twice the clip norm. Its tight dominating
    pair is (1-q) N(0, s²) + q N(1, s²) against (1-q) N(0, s²) + q N(-1, s²): a test of power p
    against example x has level at least Phi(Phi⁻¹(p) - 1/s) without it and Phi(Phi⁻¹(p) - 2/s)
    with x' in its place (Neyman and Pearson), with equality for x' = -x of full norm and half
    lines. At q = 1 this is a Gaussian mechanism with sigma / 2.

    Where a neighbour has K examples, sum_k p_k N(k, s²) and N(0, s²) with k ~ Binomial(K, q)
    dominate a step (Choquette-Choo et al. 2023, corollary 4.7: a mixture of Gaussians). Where PLD
    cannot be trusted with it, the closed form at q = 1 is claimed; replacing has no such pair.

    Args:
        events: mechanisms on one private dataset, in any order.
        delta: 1e-12 to 0.01.
        relation: which datasets are neighbours, ADD_REMOVE or REPLACE.

    Raises:
        UsageError: a value is out of range, or no accountant can be trusted with it.
    """
    _require_inputs(delta, relation, events)
    events = _merged(events)
    epsilon, accountant = _upper_bound(events, delta, relation, PLD_FINE)
    if not math.isfinite(epsilon):
        raise UsageError(
            f"no accountant gives a finite epsilon at delta {delta:g} for {_describe(events)}; "
            "use a larger delta or more noise"
        )
    return EpsilonClaim(epsilon, accountant)


def epsilon_bounds(
    events: Sequence[SampledGaussian], delta: float, relation: str = ADD_REMOVE
) -> EpsilonBounds:
    """What `compute_epsilon` claims, with the PRV accountant's second opinion.

    The PRV accountant (Gopi, Lee and Wutschitz 2021) has no REPLACE and never takes over: double
    precision leaves it fewer steps at a delta than PLD, and its upper bound lies about 0.01 above.
    Arguments and errors are those of `compute_epsilon`.
    """
    claim = compute_epsilon(events, delta, relation)
    events = _merged(events)
    pld = claim.upper
    if claim.accountant != _dp_accounting("PLD"):
        pld = _pld_epsilon(events, delta, relation, PLD_FINE)
    prv = _prv_bounds(events, delta) if relation == ADD_REMOVE else None
    if claim.accountant == CLOSED_FORM:
        lower = estimate = claim.upper
    elif prv:
        # Its estimate may lie in error above an upper bound as tight as PLD's.
        lower, estimate = prv[0], min(prv[1], claim.upper)
    else:
        lower, estimate = 0.0, claim.upper
    return EpsilonBounds(
        **asdict(claim),
        lower=lower,
        estimate=estimate,
        pld=pld if math.isfinite(pld) else None,
        prv=prv[2] if prv else None,
        probability_of_more=_probability_of_more(events, claim, relation),
    )


def group_epsilons(
    events: Sequence[SampledGaussian],
    delta: float,
    sizes: Sequence[int] = GROUP_SIZES,
    apart: bool = False,
) -> dict[int, float]:
    """Epsilon for adding or removing several units at once, such as all rows of one person.

    It is not `sizes` times epsilon at the same delta but far more. Where PLD cannot tell, the
    closed form without sampling is the bound.

    Args:
        events: mechanisms on one private dataset, in any order.
        delta: 1e-12 to 0.01, the same for all sizes.
        apart: the units may take part in different steps, whose noise is correlated. Then N(0, s²)
            is the sum of k independent N(0, s²/k), one for each unit, which are k mechanisms.

    Returns:
        Upper bounds by size.
    """
    _require_inputs(delta, ADD_REMOVE, events)
    bounds = {}
    for size in sizes:
        if apart and size > 1:
            bounds[size] = _bound_apart(events, delta, size)
            continue
        groups = [replace(event, rows_per_unit=size * event.rows_per_unit) for event in events]
        grid = PLD_FINE if size == 1 else PLD_COARSE
        bounds[size], _ = _upper_bound(_merged(groups), delta, ADD_REMOVE, grid)
    return bounds


def _bound_apart(events: Sequence[SampledGaussian], delta: float, size: int) -> float:
    """Epsilon for `size` units, each with its share of the noise."""
    shares = [(event, event.noise_multiplier / math.sqrt(size)) for event in events]
    if all(share >= MIN_NOISE and size * event.steps <= MAX_STEPS for event, share in shares):
        parts = [
            replace(event, noise_multiplier=share, steps=size * event.steps)
            for event, share in shares
        ]
        return _upper_bound(_merged(parts), delta, ADD_REMOVE, PLD_COARSE)[0]
    groups = [replace(event, rows_per_unit=size * event.rows_per_unit) for event in events]
    return _gaussian_epsilon(_gaussian_mu(groups, ADD_REMOVE), delta)


def compute_delta(
    events: Sequence[SampledGaussian], epsilon: float, relation: str = ADD_REMOVE
) -> float:
    """Upper bound on delta of the composition of `events` at `epsilon`, by closed form or PLD.

    Args:
        events: mechanisms on one private dataset, in any order.
        epsilon: at least 0.
        relation: which datasets are neighbours, ADD_REMOVE or REPLACE.

    Returns:
        Delta, at most 1.
    """
    _require("epsilon", epsilon, 0, math.inf)
    _require_inputs(MIN_DELTA, relation, events)
    return _deltas(_merged(events), (epsilon,), relation)[0]


def catch_rates(
    events: Sequence[SampledGaussian], false_alarms: Sequence[float], relation: str = ADD_REMOVE
) -> list[float]:
    """Bounds on how many of the examples that were there an attack finds.

    Every (epsilon, delta) of the composition bounds it, by delta + e^epsilon a and by
    1 - e^-epsilon (1 - delta - a) (Wasserman and Zhou 2010; Dong, Roth and Su 2022, proposition
    2.5); the least of many such bounds is taken.

    Args:
        events, relation: see `compute_delta`.
        false_alarms: a, how many of the examples that were not there it takes for some that were.

    Returns:
        The highest rate of finds at each rate of false alarms, 0 to 1.
    """
    _require_inputs(MIN_DELTA, relation, events)
    epsilons = (0.0, *(0.001 * 1.025**number for number in range(440)))  # up to 51
    bounds = list(zip(epsilons, _deltas(_merged(events), epsilons, relation)))
    return [
        min(
            min(delta + math.exp(epsilon) * rate, 1 - math.exp(-epsilon) * (1 - delta - rate))
            for epsilon, delta in bounds
        )
        for rate in false_alarms
    ]


@cache
def _deltas(
    events: tuple[SampledGaussian, ...], epsilons: tuple[float, ...], relation: str
) -> tuple[float, ...]:
    """Upper bounds on delta of merged events at each of `epsilons`, which rise."""
    if all(event.sampling_rate == 1 for event in events):
        mu = _gaussian_mu(events, relation)
        return tuple(_gaussian_delta(mu, epsilon) for epsilon in epsilons)
    deltas = _pld(events, relation, PLD_FINE).get_delta_for_epsilon(epsilons)
    return tuple(min(1.0, float(delta) + _pld_rounding(events)) for delta in deltas)


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    reserved: Sequence[SampledGaussian] = (),
    relation: str = ADD_REMOVE,
    rows_per_unit: int = 1,
) -> float:
    """The least noise multiplier, rounded up to 3 decimals, that meets the target.

    A root search (Brent) over a cheap coarse PLD finds where to look, and `compute_epsilon` has the
    last word: what it gives for the result, composed with `reserved`, is at most the target.

    Args:
        target_epsilon: above 0.
        delta: 1e-12 to 0.01.
        sampling_rate, steps: q and T of the mechanism to calibrate.
        reserved: mechanisms on the same data that the target also pays for.
        relation: ADD_REMOVE or REPLACE.
        rows_per_unit: K of the mechanism to calibrate.

    Returns:
        Sigma; 0.3, the least that is supported, where that meets the target already.

    Raises:
        UsageError: a value is out of range, or sigma 100 does not meet the target.
    """
    crossing = 10**NOISE_DECIMALS * approximate_noise_multiplier(
        target_epsilon, delta, sampling_rate, steps, reserved, relation, rows_per_unit
    )

    def noise(units: int) -> float:
        return min(max(units / 10**NOISE_DECIMALS, MIN_NOISE), MAX_NOISE)

    @cache
    def spent(units: int) -> float:
        event = SampledGaussian(sampling_rate, noise(units), steps, rows_per_unit)
        return compute_epsilon([event, *reserved], delta, relation).upper

    # The coarse PLD asks for too much noise: 0.1% at most, as far as seen.
    below = range(int(0.998 * crossing), math.ceil(crossing))
    units = below.start + bisect_left(below, True, key=lambda low: spent(low) <= target_epsilon)
    while spent(units) > target_epsilon:
        if noise(units) == MAX_NOISE:
            raise UsageError(
                f"target epsilon {target_epsilon:g} cannot be met: with noise multiplier "
                f"{MAX_NOISE:g}, the most supported, epsilon is {spent(units):.4g}; use a larger "
                "target, fewer steps or a smaller sampling rate"
            )
        units += 1
    return noise(units)


def approximate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    reserved: Sequence[SampledGaussian] = (),
    relation: str = ADD_REMOVE,
    rows_per_unit: int = 1,
    grid: tuple[float, int] = PLD_COARSE,
    most: float = MAX_NOISE,
) -> float:
    """Sigma to about 0.1%, by a coarse PLD alone: to search with, never to claim with.

    Args: see `calibrate_noise_multiplier`.
        grid: of the PLD.
        most: returned where it is not enough, which takes less time than to find what is.

    Raises:
        UsageError: a value is out of range.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise UsageError(f"target epsilon {target_epsilon}: must be finite and above 0")

    def events(sigma: float) -> list[SampledGaussian]:
        return [SampledGaussian(sampling_rate, sigma, steps, rows_per_unit), *reserved]

    _require_inputs(delta, relation, events(MAX_NOISE))

    def excess(sigma: float) -> float:
        epsilon, _ = _upper_bound(_merged(events(sigma)), delta, relation, grid)
        return math.log(min(max(epsilon, 1e-9), 1e9) / target_epsilon)

    return _crossing(cache(excess), max(MIN_NOISE, min(most, MAX_NOISE)))


def _crossing(excess: Callable[[float], float], most: float) -> float:
    """The sigma up to `most` at which a falling function crosses 0, or the end next to it."""
    from scipy.optimize import brentq

    low = high = min(1.0, most)
    # Accountants are slow at small sigma: approach it in steps.
    while excess(low) <= 0:
        if low == MIN_NOISE:
            return low
        low, high = max(MIN_NOISE, low / 1.5), low
    while excess(high) > 0:
        if high == most:
            return high
        low, high = high, min(most, 2 * high)
    return brentq(excess, low, high, xtol=0.1 / 10**NOISE_DECIMALS)


def _require(name: str, value: float, low: float, high: float) -> None:
    """Raise a UsageError unless `value` is a number within [low, high]."""
    if not low <= value <= high:
        raise UsageError(f"{name} {value}: must be between {low:g} and {high:g}")


def _require_inputs(delta: float, relation: str, events: Sequence[SampledGaussian]) -> None:
    _require("delta", delta, MIN_DELTA, MAX_DELTA)
    if relation not in (ADD_REMOVE, REPLACE):
        raise UsageError(
            f"neighbouring relation {relation!r}: must be {ADD_REMOVE!r} or {REPLACE!r}"
        )
    most = max((event.rows_per_unit for event in events), default=1)
    if relation == REPLACE and most > 1:
        raise UsageError(
            f"neighbouring relation {REPLACE!r}: no accountant has it for {most} sampled rows of a "
            f"unit; use {ADD_REMOVE!r}"
        )


def _merged(events: Sequence[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """The same composition with equal mechanisms counted together, in a fixed order."""
    steps: Counter[SampledGaussian] = Counter()
    for event in events:
        steps[replace(event, steps=0)] += event.steps
    merged = [replace(event, steps=count) for event, count in steps.items() if count]
    return tuple(sorted(merged, key=astuple))


def _describe(events: Sequence[SampledGaussian]) -> str:
    return " and ".join(
        f"{event.steps} steps of sampling rate {event.sampling_rate:g} and noise multiplier "
        f"{event.noise_multiplier:g}"
        + (f" for units of {event.rows_per_unit} rows" if event.rows_per_unit > 1 else "")
        for event in events
    )


def _split(events: Sequence[SampledGaussian]) -> tuple[list[SampledGaussian], float]:
    """The sampled events, and mu of the Gaussian mechanism that the others amount to."""
    sampled = [event for event in events if event.sampling_rate < 1]
    plain = [event for event in events if event.sampling_rate == 1]
    return sampled, _gaussian_mu(plain, ADD_REMOVE)


def _dp_accounting(name: str) -> str:
    return f"dp-accounting {version('dp-accounting')} {name}"


@cache  # a plan, its two reports and what is composed of it ask for the same
def _upper_bound(
    events: tuple[SampledGaussian, ...], delta: float, relation: str, grid: tuple[float, int]
) -> tuple[float, str]:
    """Epsilon of merged events, infinity where there is none, and what produced it."""
    if all(event.sampling_rate == 1 for event in events):
        return _gaussian_epsilon(_gaussian_mu(events, relation), delta), CLOSED_FORM
    epsilon = _pld_epsilon(events, delta, relation, grid)
    if math.isfinite(epsilon):
        return epsilon, _dp_accounting("PLD")
    if any(event.rows_per_unit > 1 for event in events):
        # A mixture is dominated by its component of the largest shift.
        return _gaussian_epsilon(_gaussian_mu(events, relation), delta), CLOSED_FORM_OF_ALL
    return _rdp_epsilon(events, delta, relation), _dp_accounting("RDP")


# --- the closed form -----------------------------------------------------------------------------


def _gaussian_mu(events: Sequence[SampledGaussian], relation: str) -> float:
    """Sensitivity over deviation of the one Gaussian mechanism that all events amount to at q 1."""
    mu = math.sqrt(
        sum(event.steps * (event.rows_per_unit / event.noise_multiplier) ** 2 for event in events)
    )
    return 2 * mu if relation == REPLACE else mu


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), rounded up (Balle and Wang, theorem 8)."""
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    if mu == 0:
        return 0.0
    # Against 60 digits it errs by 2e-10 of delta at most.
    return min(1.0, (1 + 1e-9) * float(GaussianPrivacyLoss(1 / mu).get_delta_for_epsilon(epsilon)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon, rounded up, at which `_gaussian_delta` is at most delta."""
    from dp_accounting import get_epsilon_gaussian

    if mu == 0:
        return 0.0
    epsilon = float(get_epsilon_gaussian(1 / mu, delta))
    # Its root search ends within 1e-12, or a few units in the last place, on either side.
    return epsilon and epsilon + 1e-9 * max(1.0, epsilon)


# --- the PRV accountant --------------------------------------------------------------------------


@cache
def _prv_bounds(
    events: tuple[SampledGaussian, ...], delta: float
) -> tuple[float, float, float] | None:
    """Lower bound, estimate and upper bound, or None where they cannot be had or trusted.

    It follows the removal of an example only; adding one costs no more (PLD, which follows both,
    has never shown otherwise by more than its own rounding).
    """
    import numpy as np
    from prv_accountant import PRVAccountant
    from prv_accountant.accountant import compute_safe_domain_size
    from prv_accountant.privacy_random_variables import (
        GaussianMechanism,
        PoissonSubsampledGaussianMechanism,
    )

    delta_error = delta * PRV_DELTA_ERROR
    total = sum(event.steps for event in events)
    # Its cumulative probabilities are doubles near 1: every step may lose 2^-52 of its tail.
    if delta_error < total * DOUBLE_ROUNDING:
        return None
    sampled, mu = _split(events)
    if any(event.rows_per_unit > 1 for event in sampled):
        return None
    variables = [
        PoissonSubsampledGaussianMechanism(event.sampling_rate, event.noise_multiplier)
        for event in sampled
    ]
    counts = [event.steps for event in sampled]
    if mu:
        variables.append(GaussianMechanism(1 / mu))
        counts.append(1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            half_width = compute_safe_domain_size(variables, counts, PRV_EPS_ERROR, delta_error)
            mesh = PRV_EPS_ERROR / math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
            if not 2 * half_width / mesh <= PRV_MAX_CELLS:
                return None
            accountant = PRVAccountant(
                variables, PRV_EPS_ERROR, delta_error, counts, eps_max=half_width
            )
            lower, estimate, upper = accountant.compute_epsilon(delta, counts)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError):
            return None
    if not (0 <= estimate < math.inf and lower <= estimate <= upper < math.inf):
        return None
    return max(0.0, lower), estimate, upper


# --- the PLD accountant --------------------------------------------------------------------------


def _pld_rounding(events: Sequence[SampledGaussian]) -> float:
    """Delta that rounding in the FFT of `_pld` may hide: five times the most seen up to T 1e5."""
    return DOUBLE_ROUNDING * sum(event.steps for event in events)


def _pld_epsilon(
    events: tuple[SampledGaussian, ...], delta: float, relation: str, grid: tuple[float, int]
) -> float:
    """Upper bound by PLD, of both directions; infinity where delta is too small for doubles."""
    if not events:
        return 0.0
    slack = _pld_rounding(events)
    if slack > delta / 2:
        return math.inf
    return float(_pld(events, relation, grid).get_epsilon_for_delta(delta - slack))


@lru_cache(maxsize=2)  # one a relation: epsilon at several deltas, and delta, are read off the same
def _pld(
    events: tuple[SampledGaussian, ...], relation: str, grid: tuple[float, int]
) -> "PrivacyLossDistribution":
    """A pessimistic distribution of the privacy loss of all events together."""
    sampled, mu = _split(events)
    parts = [(_step_of(event, relation), event.steps) for event in sampled]
    if mu:
        parts.append((_SampledStep(1.0, 1 / mu, relation), 1))
    interval = _interval([(*step.spread(), count) for step, count in parts], *grid)
    composed = [step.distribution(interval).self_compose(count) for step, count in parts]
    return reduce(lambda total, part: total.compose(part), composed)


def _step_of(event: SampledGaussian, relation: str) -> "_SampledStep | MixtureStep":
    """One step of a sampled event."""
    if event.rows_per_unit == 1:
        return _SampledStep(event.sampling_rate, event.noise_multiplier, relation)
    from utils.privacy.mixtures import MixtureStep

    return MixtureStep(event.sampling_rate, event.noise_multiplier, event.rows_per_unit)


@dataclass(frozen=True)
class _SampledStep:
    """A Gaussian mechanism on a Poisson sample, about one example: the methods of `MixtureStep`."""

    rate: float
    sigma: float
    relation: str

    def spread(self) -> tuple[float, float]:
        """Length of the range of losses, and their variance, both at most."""
        shift = 2 if self.relation == REPLACE else 1
        mu, rate = shift / self.sigma, self.rate
        # The loss of a plain Gaussian at the outermost point that the discretisation keeps.
        extreme = shift * (11 + mu) / self.sigma
        top = math.log(rate) + extreme if extreme > 50 else math.log1p(rate * math.expm1(extreme))
        width = top + min(extreme, -math.log1p(-rate) if rate < 1 else extreme)
        return width, min(rate**2 * math.expm1(min(50.0, mu**2)), mu**2 + mu**4)

    def distribution(self, interval: float) -> "PrivacyLossDistribution":
        """The pessimistic distribution of the loss on a grid."""
        from dp_accounting import NeighboringRelation
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_gaussian_mechanism(
            self.sigma,
            value_discretization_interval=interval,
            sampling_prob=self.rate,
            neighboring_relation=NeighboringRelation[
                "ADD_OR_REMOVE_ONE" if self.relation == ADD_REMOVE else "REPLACE_ONE"
            ],
        )


def _interval(
    parts: Sequence[tuple[float, float, int]], widest: float, per_deviation: int
) -> float:
    """Discretisation of privacy losses: fine against their spread, coarse enough to afford.

    Any interval gives an upper bound; a wider one a looser bound in less time and memory.

    Args:
        parts: width, variance and number of each kind of step.
    """
    variance = sum(count * each for _, each, count in parts)
    # Rounding a loss of deviation s to a grid of spacing h adds at most about h s to its variance.
    added = sum(count * math.sqrt(each) for _, each, count in parts)
    widths = [width for width, _, _ in parts]
    return max(
        min(widest, variance / added / per_deviation),
        max(widths) / PLD_STEP_CELLS,
        (sum(widths) + 20 * math.sqrt(variance)) / PLD_CELLS,
    )


@cache
def _probability_of_more(
    events: tuple[SampledGaussian, ...], claim: EpsilonClaim, relation: str
) -> float | None:
    """P(privacy loss > epsilon) of merged events; None where the claim is not of their own loss.

    delta(eps) = E[(1 - e^(eps - L))+], so P(L > eps) = delta(eps) - delta'(eps).
    """
    epsilon = claim.upper
    if claim.accountant == CLOSED_FORM:
        mu = _gaussian_mu(events, relation)
        return math.erfc((epsilon / mu - mu / 2) / math.sqrt(2)) / 2 if mu else 0.0
    if claim.accountant != _dp_accounting("PLD"):
        return None
    loss, step = _pld(events, relation, PLD_FINE), 1e-6
    delta, after = (float(loss.get_delta_for_epsilon(epsilon + gap)) for gap in (0, step))
    return min(1.0, delta + (delta - after) / math.expm1(step) + _pld_rounding(events))


# --- Renyi DP ------------------------------------------------------------------------------------


def _rdp_epsilon(events: Sequence[SampledGaussian], delta: float, relation: str) -> float:
    """Upper bound by Renyi DP, whose arithmetic holds at any delta; infinity for REPLACE."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if relation == REPLACE:
        return math.inf
    # Whole orders only: the sums for others need not converge at small sigma.
    accountant = RdpAccountant([*range(2, 64), 128, 256, 512, 1024])
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        accountant.compose(PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
    return float(accountant.get_epsilon(delta))
