"""Intervals for the figures of an evaluation: by bootstrap over examples, or over seeds."""

from collections.abc import Callable

import numpy as np

RESAMPLES, CONFIDENCE = 1000, 0.95
BOOTSTRAP = f"{CONFIDENCE:.0%} bootstrap over examples ({RESAMPLES:,} resamples)"
SEEDS = "mean minus and plus one standard deviation over seeds"


def bootstrap(
    *columns: np.ndarray, statistic: Callable[..., np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """A percentile interval (Efron 1979) of a statistic of examples.

    Args:
        columns: float64 [examples] each; an example keeps its values together.
        statistic: maps resampled columns, each [resamples, examples], to [resamples].

    Returns:
        The lower and upper end, at `CONFIDENCE`.
    """
    random = np.random.default_rng(seed)
    count = len(columns[0])
    values = []
    # In parts, so that a million examples need no gigabytes of indices.
    part = max(1, min(RESAMPLES, 4_000_000 // count))
    for start in range(0, RESAMPLES, part):
        drawn = random.integers(count, size=(min(part, RESAMPLES - start), count))
        values.append(statistic(*(column[drawn] for column in columns)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def over_examples(values: np.ndarray) -> np.ndarray:
    """The mean of each row: a statistic for `bootstrap`."""
    return values.mean(axis=1)


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Sum over sum of each row, such as the loss per token of several examples."""
    return numerators.sum(axis=1) / denominators.sum(axis=1)


def mean_and_spread(values: list[float]) -> tuple[float, float, float]:
    """Mean, and mean minus and plus the standard deviation of the values themselves."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return mean, mean - spread, mean + spread


def plus_minus(values: list[float]) -> str:
    """Mean and standard deviation, for a table."""
    mean, low, _ = mean_and_spread(values)
    return f"{mean:.3f} +- {mean - low:.3f}"
