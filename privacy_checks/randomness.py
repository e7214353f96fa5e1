"""Tests of who was sampled and of the noise that was added, as p-values of what was recorded."""

from collections.abc import Sequence

import numpy as np
from scipy import fft, special, stats


def _two_sided(distribution, statistic: float) -> float:
    return float(2 * min(distribution.cdf(statistic), distribution.sf(statistic)))


def batch_size_p_value(taken: np.ndarray, rate: float) -> float:
    """The variance of the batch sizes against N q (1 - q), by chi-square.

    Args:
        taken: bool [steps, examples], who was in which batch.
        rate: q.
    """
    steps, examples = taken.shape
    sizes = taken.sum(axis=1)
    statistic = ((sizes - examples * rate) ** 2).sum() / (examples * rate * (1 - rate))
    return _two_sided(stats.chi2(steps), statistic)


def count_p_value(taken: np.ndarray, rate: float) -> float:
    """How often each example was taken against Binomial(steps, q), by chi-square of the variance.

    Args: as for `batch_size_p_value`.
    """
    return batch_size_p_value(taken.T, rate)


def adjacent_p_value(taken: np.ndarray, rate: float) -> float:
    """Being in both of two adjacent batches against q², exactly.

    Args: as for `batch_size_p_value`.
    """
    first, second = taken[:-1:2], taken[1::2]
    return float(stats.binomtest(int((first & second).sum()), second.size, rate**2).pvalue)


def scale_p_value(noise: np.ndarray) -> float:
    """The variance of noise that should be N(0, 1), by chi-square.

    Args:
        noise: float [steps, parameters].
    """
    return _two_sided(stats.chi2(noise.size), float((noise**2).sum()))


def repetition_p_value(noise: np.ndarray, other: np.ndarray | None = None) -> float:
    """The largest correlation between any two steps at any shift along the parameters.

    Noise that is used twice shows wherever it turns up again: in another step, in another tensor
    of the same step, or, with `other`, after another process start.

    Args:
        noise: float [steps, parameters].
        other: float [steps, parameters] of another process start; None compares `noise` with
            itself, leaving out each step with itself at shift 0.

    Returns:
        The p-value, corrected for the number of pairs and shifts.
    """
    size = noise.shape[1]
    spectra = fft.rfft(_unit_rows(noise))
    others = spectra if other is None else fft.rfft(_unit_rows(other))
    largest, tests = 0.0, 0
    for row, spectrum in enumerate(spectra):
        partners = others[row:] if other is None else others
        correlations = np.abs(fft.irfft(spectrum * partners.conj(), size))
        if other is None:
            correlations[0, 0] = 0.0
        largest = max(largest, float(correlations.max()))
        tests += correlations.size
    return min(1.0, 2 * tests * float(special.ndtr(-largest * np.sqrt(size))))


def whitened(noise: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    """C on the noise of one process start, which a plan's coefficients make white again.

    Args:
        noise: float [steps, parameters].
        coefficients: the first column of C; (1,) for noise that is white as it is.
    """
    return np.stack(
        [
            sum(c * noise[step - j] for j, c in enumerate(coefficients[: step + 1]))
            for step in range(len(noise))
        ]
    )


def _unit_rows(noise: np.ndarray) -> np.ndarray:
    return noise / np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-300)
