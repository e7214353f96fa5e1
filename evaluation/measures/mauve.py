"""MAUVE: how close a set of texts is to another, seen through an embedding.

The area under the divergence frontier of two histograms over shared clusters (Pillutla et al.
2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers").
"""

import numpy as np

from resample_with_dp_histogram.clusters import fit_clusters

# c of the paper's equation 2, and the number of mixture weights on the frontier.
SCALE, FRONTIER_POINTS = 5.0, 101


def mauve(
    one: np.ndarray, other: np.ndarray, seed: int = 0, num_clusters: int | None = None
) -> float:
    """MAUVE of two equally large sets of embeddings: near 1 if they are alike, near 0 if not.

    Both are clustered together (unit length, PCA to 90% of the variance, k-means) and compared by
    their shares of the clusters. The score depends on the clusters, so report its spread over
    seeds; it depends on the number of rows and of clusters too, so compare scores of equal ones.

    Args:
        one, other: float16 [rows, dimensions] each, unit vectors of one model.
        num_clusters: a tenth of the rows of one set if None, which the paper recommends.

    Returns:
        The score, 0.004 to 1.

    Raises:
        ValueError: sets of different sizes: the smaller one would look narrower than it is.
    """
    if len(one) != len(other):
        raise ValueError(f"MAUVE compares sets of equal size; found {len(one)} and {len(other)}")
    rows = np.concatenate([one, other])
    count = max(2, len(one) // 10) if num_clusters is None else num_clusters
    bins = fit_clusters(rows, count, seed, "MAUVE's rows").assign(rows, "MAUVE's rows")
    halves = (np.bincount(half, minlength=count) for half in np.split(bins, 2))
    return frontier_area(*(counts / counts.sum() for counts in halves))


def frontier_area(p: np.ndarray, q: np.ndarray) -> float:
    """The area under the divergence frontier of two distributions (equations 1 and 2).

    The frontier is the curve (exp(-c KL(Q|R)), exp(-c KL(P|R))) over mixtures R = a P + (1 - a) Q,
    a from 0 to 1. Equal distributions give 1, disjoint ones 1 / binomial(2c, c).

    Args:
        p, q: float64 [clusters], each with the sum 1.
    """
    weights = np.linspace(0, 1, FRONTIER_POINTS)[:, None]
    mixtures = weights * p + (1 - weights) * q
    x, y = (np.exp(-SCALE * divergences(each, mixtures)) for each in (q, p))
    # x falls as the weight grows, and y rises to 1, where the frontier goes on level to the axis.
    return float(np.trapezoid([1.0, *y[::-1]], [0.0, *x[::-1]]))


def divergences(p: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
    """KL(p | mixture) in nats of each of the mixtures [mixtures, clusters]; may be infinite."""
    positive = p > 0
    with np.errstate(divide="ignore"):
        return (p[positive] * np.log(p[positive] / mixtures[:, positive])).sum(axis=1)
