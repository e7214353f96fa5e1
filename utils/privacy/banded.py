"""Noise that is correlated over steps: banded matrix factorisation. No torch is imported.

Training adds up what its steps release, and white noise adds up with it. Noise C^-1 z, of white z
and a lower-triangular Toeplitz matrix C, partly cancels from step to step; releasing G + C^-1 z is
releasing C G + z. Whoever takes part in every b-th step at most, where C has b bands, moves rows of
C G that no other step of theirs moves, and each time by a column of C, whose norm is at most 1. So
ceil(T / b) sampled Gaussian mechanisms account for T steps. Steps take turns at b groups, and draw
from theirs at b times the sampling rate.

Source: Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization: A unified approach to
private training". The argument in full: docs/guarantee.md.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from utils.cli import UsageError
from utils.privacy.accounting import (
    MIN_RATE,
    PLD_ROUGH,
    SampledGaussian,
    approximate_noise_multiplier,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

WHITE, BANDED = "white", "banded"
WITHOUT_BANDS = (1.0,)
# Decimals of coefficients, so that two machines whose optimisers differ in the last bits agree, and
# the least that one is of the one before it, in the search for them.
DECIMALS, LEAST_RATIO = 4, 1e-3
# The most bands that are chosen by themselves: their noise is kept in memory.
MOST_CHOSEN = 64


def band_coefficients(bands: int, steps: int) -> tuple[float, ...]:
    """The first column of C for which the noise of prefix sums is least.

    From the truncated square root of the matrix of ones, which is close for few steps, a
    quasi-Newton search (L-BFGS-B) goes on along the exact gradient of `prefix_error`. It looks for
    the ratios of neighbours, in (0, 1]: where coefficients fall, C^-1 does not grow with T.

    Args:
        bands: b, from 1 to `steps`.
        steps: T.

    Returns:
        b numbers, cut to 4 decimals, whose squares add up to 1 at most.
    """
    import numpy as np
    from scipy.optimize import minimize

    left = np.arange(steps, 0, -1.0)

    def objective(ratios: np.ndarray) -> tuple[float, np.ndarray]:
        # ln |c|² + ln sum_t (T - t) w_t², where L(c) w = 1; with L(c)' y = (T - t) w the slope of
        # the second sum along c_j is -2 sum_t y_t w_(t-j), and c_j is the product of j ratios.
        column = np.cumprod([1.0, *ratios])
        sums = _solved(column, np.ones(steps))
        total, square = left @ sums**2, column @ column
        adjoint = _solved(column, (left * sums)[::-1])[::-1]
        slopes = [-2 * adjoint[j:] @ sums[: steps - j] for j in range(1, bands)]
        weighted = column[1:] * (np.array(slopes) / total + 2 * column[1:] / square)
        return np.log(total * square), np.cumsum(weighted[::-1])[::-1] / ratios

    ratios = np.array([(2 * k - 1) / (2 * k) for k in range(1, bands)])
    if bands > 1:
        bounds = [(LEAST_RATIO, 1.0)] * len(ratios)
        ratios = minimize(objective, ratios, jac=True, method="L-BFGS-B", bounds=bounds).x
    column = np.cumprod([1.0, *ratios])
    column /= np.linalg.norm(column)
    return tuple(float(value) for value in np.trunc(column * 10**DECIMALS) / 10**DECIMALS)


def prefix_error(coefficients: Sequence[float], steps: int) -> float:
    """Root mean square, over prefixes of T steps, of the deviation of their summed noise.

    Args:
        coefficients: the first column of C; (1,) for white noise, whose error is
            sqrt((T + 1) / 2).
        steps: T.
    """
    import numpy as np

    sums = _solved(coefficients, np.ones(steps))
    return float(np.sqrt(np.arange(steps, 0, -1.0) @ sums**2 / steps))


def deviations(coefficients: Sequence[float], steps: int) -> tuple[float, float]:
    """Of the noise of the last of T steps, and of the sum of all their noise, for z of N(0, 1)."""
    import numpy as np

    impulse = np.zeros(steps)
    impulse[0] = 1.0
    inverse = _solved(coefficients, impulse)
    return float(np.linalg.norm(inverse)), float(np.linalg.norm(np.cumsum(inverse)))


def _solved(coefficients: "Sequence[float] | np.ndarray", values: "np.ndarray") -> "np.ndarray":
    """C^-1 values, by forward substitution."""
    from scipy.signal import lfilter

    return lfilter([1.0], coefficients, values)


def best_bands(
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    steps: int,
    reserved: Sequence[SampledGaussian] = (),
) -> int:
    """The number of bands whose computed noise on prefix sums is least at a target.

    Of all that let a unit take part in m steps the fewest bands are tried, since these draw from
    the largest groups, for m half as large again each time. Takes about a second.

    Args: see `PrivacyPlan` and `calibrate_noise_multiplier`.

    Returns:
        b; 1 where white noise is best, or no accountant has so small a sampling rate.
    """
    rate = batch_size / num_examples
    most = min(MOST_CHOSEN, steps, num_examples // batch_size)
    best, least = 1, math.inf
    for bands in bands_to_try(steps, most):
        if bands * rate < MIN_RATE:
            continue
        error = prefix_error(band_coefficients(bands, steps), steps)
        worth = least / error
        sigma = approximate_noise_multiplier(
            target_epsilon, delta, bands * rate, -(-steps // bands), reserved,
            grid=PLD_ROUGH, most=worth,
        )  # fmt: skip
        if sigma < worth:
            best, least = bands, sigma * error
    return best


def bands_to_try(steps: int, most: int) -> list[int]:
    """Numbers of bands from 1 to `most`, the largest first, see `best_bands`."""
    found, times = set[int](), -(-steps // most)
    while times < steps:
        found.add(-(-steps // times))
        times = max(times + 1, times * 3 // 2)
    return sorted(found | {1}, reverse=True)


def participations(steps: Iterable[int], bands: int) -> int:
    """In how many of some steps one unit may take part: of each b in turn, in one.

    Args:
        steps: their numbers, each as often as it was taken. One that a crash lost and that was
            taken again counts twice; C began anew between the two.
    """
    if isinstance(steps, range) and steps.step == 1:
        return -(-len(steps) // bands)  # at once, for however many are asked for
    return max(Counter(step % bands for step in steps).values(), default=0)


def groups_of(keys: "np.ndarray", of_row: "np.ndarray | None", bands: int) -> "np.ndarray":
    """The group of every unit, which its own rows decide, whatever other rows there are.

    Args:
        keys: uint64 [rows], of what each row holds.
        of_row: int64 [rows], the unit of each row, numbered from 0; None where it is the row.

    Returns:
        int64 [units], each in [0, bands).
    """
    import numpy as np

    if of_row is not None:
        of_units = np.zeros(of_row.max() + 1, dtype=np.uint64)
        np.add.at(of_units, of_row, keys)  # modulo 2^64, in whatever order the rows come
        keys = of_units
    return (keys % np.uint64(bands)).astype(np.int64)


class CorrelatedNoise:
    """C^-1 z, a row a step, by forward substitution: n_t = (z_t - sum_j c_j n_(t-j)) / c_0.

    It follows from fresh noise and public coefficients alone, begins anew with every object, and
    is in memory only: b - 1 float64 vectors, where those of fresh noise are.
    """

    def __init__(self, coefficients: Sequence[float]):
        self._coefficients = coefficients
        self._past: deque[torch.Tensor] = deque(maxlen=len(coefficients) - 1)
        self._last = 0

    def following(self, step: int, fresh: "torch.Tensor") -> "torch.Tensor":
        """The noise of a step.

        Args:
            fresh: float64 [parameters], of N(0, 1); it becomes the result.

        Raises:
            RuntimeError: the step does not follow the last one, so that the same group might come
                again before b steps have passed.
        """
        if self._past and step != self._last + 1:
            raise RuntimeError(f"correlated noise of step {step} cannot follow step {self._last}")
        first, *others = self._coefficients
        for coefficient, past in zip(others, self._past):
            fresh.sub_(past, alpha=coefficient)
        fresh.div_(first)
        self._past.appendleft(fresh)
        self._last = step
        return fresh


def require_bands(bands: int, num_examples: int, batch_size: int, steps: int) -> None:
    """Raise a UsageError unless every group has a step, and enough to draw from."""
    most = min(steps, num_examples // batch_size)
    if not 1 <= bands <= most:
        raise UsageError(
            f"--bands {bands}: at most {most}, for {steps} steps in which --total_bs {batch_size} "
            f"of {num_examples} are drawn from one of as many groups; use --bands {most} or fewer"
        )


def require_sound(coefficients: Sequence[float]) -> None:
    """Raise a UsageError if a column of C is longer than what is accounted for."""
    if not (coefficients[0] > 0 and math.fsum(c * c for c in coefficients) <= 1):
        raise UsageError(
            f"band_coefficients {list(coefficients)}: the first must be above 0 and their squares "
            "add up to 1 at most, or there is less noise than epsilon says; restore the ledger"
        )
