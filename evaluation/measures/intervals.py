"""Intervals for the figures of an evaluation: by bootstrap over examples, or over seeds."""

from collections.abc import Callable

import numpy as np
from scipy import stats

RESAMPLES, CONFIDENCE = 1000, 0.95
BOOTSTRAP = f"{CONFIDENCE:.0%} bootstrap over examples ({RESAMPLES:,} resamples)"
EXACT = "exact (Clopper and Pearson 1934) for a share of none or of all"
SEEDS = "mean minus and plus one standard deviation over seeds"


def bootstrap(
    *columns: np.ndarray, statistic: Callable[..., np.ndarray | float], seed: int = 0
) -> tuple[float, float]:
    """A percentile interval (Efron 1979) of a statistic of examples.

    Args:
        columns: float64 [examples] each; an example keeps its values together.
        statistic: of resampled columns [examples]; of many resamples at once, along `axis`, if
            it has such an argument.

    Returns:
        The lower and upper end, at `CONFIDENCE`; of a single example, its own value twice.
    """
    count = len(columns[0])
    if count == 1:
        value = float(statistic(*columns))
        return value, value
    found = stats.bootstrap(
        columns,
        statistic,
        n_resamples=RESAMPLES,
        # A million examples would need gigabytes of indices at once.
        batch=max(1, 4_000_000 // count),
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def share_interval(values: np.ndarray) -> tuple[float, float]:
    """An interval of a mean of values from 0 to 1: `bootstrap`, or exact for none and all.

    Resampling nothing but zeros gives zeros, as though no other example could be.

    Args:
        values: float64 [examples].

    Returns:
        The lower and upper end, at `CONFIDENCE`.
    """
    if values.min() == values.max() and values[0] in (0, 1):
        test = stats.binomtest(int(values.sum()), len(values))
        found = test.proportion_ci(CONFIDENCE, method="exact")
        return float(found.low), float(found.high)
    return bootstrap(values, statistic=np.mean)


def ratio_of_sums(
    numerators: np.ndarray, denominators: np.ndarray, axis: int = -1
) -> np.ndarray | float:
    """Sum over sum along `axis`, such as the loss per token of several examples."""
    return numerators.sum(axis) / denominators.sum(axis)


def mean_and_spread(values: list[float]) -> tuple[float, float, float]:
    """Mean, and mean minus and plus the standard deviation of the values themselves."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return mean, mean - spread, mean + spread


def plus_minus(values: list[float]) -> str:
    """Mean and standard deviation, for a table."""
    mean, low, _ = mean_and_spread(values)
    return f"{mean:.3f} +- {mean - low:.3f}"
