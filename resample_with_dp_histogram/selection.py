"""Which synthetic rows follow a histogram: numbers by bin, then rows of each bin.

All of it reads the noisy histogram and the synthetic pool only, which is post-processing: it
spends nothing, and its random numbers may be public.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """How many rows each bin gives.

    Attributes:
        counts: int64 [bins].
        overflow: rows that their bin did not have, and other bins gave.
        from_empty_bins: those of them from bins in which the histogram has nothing.
    """

    counts: np.ndarray
    overflow: int
    from_empty_bins: int


Share = Callable[[np.ndarray, int], np.ndarray]


def largest_remainders(probabilities: np.ndarray, size: int) -> np.ndarray:
    """Whole numbers [bins] that add up to `size` and differ from p · size by less than 1."""
    exact = probabilities * size
    counts = np.floor(exact).astype(np.int64)
    missing = size - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def allocate(weights: np.ndarray, capacities: np.ndarray, size: int, share: Share) -> Allocation:
    """Share `size` rows out over bins; where a bin has too few, the others give the rest.

    Args:
        weights: float64 [bins], at least 0 and not all 0.
        capacities: int64 [bins], rows that each bin can give; `size` or more in all.
        share: turns probabilities and a size into whole numbers of that sum, such as
            `largest_remainders`, or a multinomial draw.
    """
    counts = np.minimum(share(weights / weights.sum(), size), capacities)
    missing = overflow = size - int(counts.sum())
    from_empty_bins = 0
    while missing:
        free = capacities - counts
        wanting = np.where(free > 0, weights, 0.0)
        if not wanting.any():
            # Only bins without weight have rows left: as they have them.
            wanting = free.astype(np.float64)
            from_empty_bins = from_empty_bins or missing
        given = np.minimum(share(wanting / wanting.sum(), missing), free)
        counts += given
        missing -= int(given.sum())
    return Allocation(counts, overflow, from_empty_bins)


def choose_rows(bins: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Random rows of each bin, as many as asked for, in random order.

    No row is taken twice before every row of its bin is taken once, and so on.

    Args:
        bins: int [rows], the bin of each row of the pool.
        counts: int64 [bins], rows to take; 0 where the pool has none.

    Returns:
        int64 [rows taken].
    """
    # A random order within each bin.
    shuffled = random.permutation(len(bins))
    by_bin = shuffled[np.argsort(bins[shuffled], kind="stable")]
    sizes = np.bincount(bins, minlength=len(counts))
    starts = np.cumsum(sizes) - sizes
    chosen = [
        by_bin[start + np.arange(count) % size]
        for start, size, count in zip(starts, sizes, counts)
        if count
    ]
    return random.permutation(np.concatenate(chosen))


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """Half the l1 distance of two histograms, each at sum 1: 0 if equal, 1 if disjoint."""
    return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2)
