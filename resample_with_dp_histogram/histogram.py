"""The DP histogram of private embeddings over public clusters, and its consistent form."""

import numpy as np
import torch

from utils.dp_utils import add_noise
from utils.secure_random import SecureRandom

# Adding or removing one private row moves one bin by 1, in l2 norm too; one unit moves all of its
# bins together by at most that (see `unit_weights`).
SENSITIVITY = 1.0
# Weights are whole multiples of 1 / WEIGHT_PARTS.
WEIGHT_PARTS = 1 << 30


def unit_weights(units: np.ndarray) -> np.ndarray:
    """What each row counts so that its unit counts 1: 1/k for a unit of k rows, rounded down.

    Guarantee: the weights of a unit add up to at most 1. They are multiples of 2^-30, and so are
    all sums of them, which float64 holds exactly up to 2^23 units in a bin, in whatever order they
    are added. A unit that leaves thus moves a histogram by its own weights, to the last bit: by at
    most 1 in l1 norm, and in l2 norm too.

    Args:
        units: int64 [rows], the unit of each private row.

    Returns:
        float64 [rows].
    """
    _, places, sizes = np.unique(units, return_inverse=True, return_counts=True)
    return (WEIGHT_PARTS // sizes / WEIGHT_PARTS)[places]


def noisy_histogram(
    bins: np.ndarray,
    num_bins: int,
    sigma: float,
    random: SecureRandom,
    units: np.ndarray | None = None,
) -> np.ndarray:
    """Count private rows in bins and add N(0, sigma²) to each count, on a public grid.

    Guarantee: where each row's bin depends on that row alone (see `Clusters`), this is one
    Gaussian mechanism of noise multiplier `sigma` for adding or removing one row, or one unit with
    all of its rows.

    Args:
        bins: int [rows], the bin of each private row.
        units: int64 [rows], whose rows they are: a row then counts its part of its unit (see
            `unit_weights`). None counts every row as 1.
        sigma: 0 adds no noise, which only a test may ask for.

    Returns:
        float64 [num_bins]; some counts may be below 0.
    """
    weights = None if units is None else unit_weights(units)
    counts = torch.from_numpy(np.bincount(bins, weights, minlength=num_bins))
    if sigma == 0:
        return counts.double().numpy()
    return add_noise(counts, sigma, SENSITIVITY, random).numpy()


def project_to_simplex(values: np.ndarray, total: float) -> np.ndarray:
    """The nearest histogram, in l2 distance, without negative counts and with a known total.

    Subtracts from all bins the one constant that leaves `total` above zero (Duchi et al. 2008,
    "Efficient Projections onto the l1-Ball", figure 1). Clamping at zero would instead keep the
    positive half of the noise of every empty bin: sigma · 0.4 a bin, that is 4,000 rows that are
    not there with 1,000 empty bins at sigma 10.

    Args:
        values: float64 [bins], noisy counts.
        total: what the counts add up to, above 0; N, which is public.

    Returns:
        float64 [bins], at least 0, with the sum `total`.
    """
    descending = np.sort(values)[::-1]
    # The constant that brings the k largest to the total, for every k.
    constants = (np.cumsum(descending) - total) / np.arange(1, len(values) + 1)
    last = np.flatnonzero(descending > constants)[-1]
    return np.maximum(values - constants[last], 0.0)
