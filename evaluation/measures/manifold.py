"""How two sets of embeddings lie to each other: neighbours, and the ground that both cover.

Every distance here is exact, so that repeated texts, whose distance is 0, count as what they are:
a float16 of a unit vector is a multiple of 2^-24, so products are multiples of 2^-48, and sums of
them below 8 fit the 53 bits of a float64, in whatever order they are added. The float32 of a search
library would decide ties between equal texts by rounding.
"""

from collections.abc import Iterator

import numpy as np

from resample_with_dp_histogram.embeddings import blocks, lengths

# Rows of a block of distances to all rows of the other set.
BLOCK_ROWS = 1024


def overlap(real: np.ndarray, other: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage of `other` with respect to `real`.

    A set's ground is the union of balls around its rows, each as wide as the distance to the
    row's k-th nearest other row of the same set. Precision is the share of `other` on the ground
    of `real`, and recall the share of `real` on that of `other` (Kynkäänniemi et al. 2019,
    "Improved Precision and Recall Metric for Assessing Generative Models", equations 1 to 3).
    Density is the mean number of real balls that a row of `other` lies in, over k: unlike
    precision, it gives an outlier's wide ball little weight. Coverage is the share of real balls
    that hold a row of `other` (Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for
    Generative Models", section 3). Two sets of m rows from one distribution have density 1 and
    coverage 1 - 2^-k, in expectation and for m far above k.

    Args:
        real, other: float16 [rows, dimensions] each, unit vectors of one model.
        k: below the number of rows of either.

    Returns:
        The four figures by their names; all are shares, but for the density.
    """
    real_radii, other_radii = radii(real, k), radii(other, k)
    on_real, balls = np.empty(len(other), dtype=bool), 0
    real_on_other, covered = (np.zeros(len(real), dtype=bool) for _ in range(2))
    for place, distances in squared_distances(other, real):
        inside = distances <= real_radii
        on_real[place] = inside.any(axis=1)
        balls += inside.sum()
        covered |= inside.any(axis=0)
        real_on_other |= (distances <= other_radii[place, None]).any(axis=0)
    return {
        "precision": float(on_real.mean()),
        "recall": float(real_on_other.mean()),
        "density": float(balls / (k * len(other))),
        "coverage": float(covered.mean()),
    }


def radii(vectors: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row: float64 [rows]."""
    nearest = np.empty(len(vectors))
    for place, distances in squared_distances(vectors, vectors):
        # Place 0 is the row's own: no distance is below 0.
        nearest[place] = np.partition(distances, k, axis=1)[:, k]
    return nearest


def squared_distances(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of float64 [rows of one, all rows of other], each with its place in `one`."""
    wide = other.astype(np.float64)
    squares = np.einsum("nd,nd->n", wide, wide)
    for place, block in blocks(one, BLOCK_ROWS):
        own_squares = np.einsum("nd,nd->n", block, block)
        yield place, own_squares[:, None] + squares - 2 * (block @ wide.T)


def mean_similarity(vectors: np.ndarray) -> float:
    """The mean cosine similarity of all pairs of different rows."""
    wide = vectors.astype(np.float64)
    total = (wide / lengths(wide)[:, None]).sum(axis=0)
    # The square of the sum holds every pair twice, and each row with itself.
    return float((total @ total - len(vectors)) / (len(vectors) * (len(vectors) - 1)))


def nearest_similarity(vectors: np.ndarray) -> float:
    """The mean cosine similarity of a row to its nearest other row."""
    return float(1 - radii(vectors, 1).mean() / 2)
