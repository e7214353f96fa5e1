"""Clusters of sentence embeddings: unit length, PCA, k-means; and the cluster of each vector."""

from dataclasses import dataclass

import numpy as np

from resample_with_dp_histogram.embeddings import BLOCK_ROWS, blocks, lengths, require_unit
from utils.cli import UsageError

PCA_VARIANCE = 0.9
KMEANS_ITERATIONS = 20
# More points than these move a centroid by less than the next seed does (faiss draws as many).
POINTS_PER_CLUSTER = 256
# Units in which `Clusters` holds weights; see its guarantee.
WEIGHT_UNIT = 2.0**-26


@dataclass(frozen=True)
class Clusters:
    """Clusters as one affine function of a unit vector each: the nearest has the lowest score.

    With x a vector, W the principal components, m the mean of the unit vectors and c a centroid,
    the squared distance |W'(x/|x| - m) - c|² is, but for what all clusters share,

        offset - 2 (x · weight) / |x|,  weight = W c,  offset = |c|² + 2 m · weight.

    Guarantee: the cluster of a vector depends on that vector and on the clusters alone, to the
    last bit. A float16 is a multiple of 2^-24 and a weight is rounded to one of 2^-26, so every
    product and every partial sum of x · weight is a multiple of 2^-50; for |x| about 1 and |c| at
    most 2 it stays below 4 and so fits the 53 bits of a float64. Exact sums do not depend on their
    order: not on the shape of a block, on a row's place in it, on threads or on the library. In
    rounded arithmetic a row that leaves can move the others to where a kernel adds in another
    order, and one that lies between two clusters changes its bin; the histogram would then move by
    more than the 1 that its noise is scaled to.

    Attributes:
        weights: float64 [dimensions, clusters], multiples of WEIGHT_UNIT.
        offsets: float64 [clusters].
        num_components: principal components that were kept.
    """

    weights: np.ndarray
    offsets: np.ndarray
    num_components: int

    def assign(self, vectors: np.ndarray, where: str) -> np.ndarray:
        """The nearest cluster of each vector, the first of those that are equally near.

        Args:
            vectors: float16 [rows, dimensions], of length 1 but for rounding; may be a memmap.
            where: names them in a message.

        Returns:
            int32 [rows].

        Raises:
            UsageError: a row is not a unit vector; NaN included.
        """
        nearest = np.empty(len(vectors), dtype=np.int32)
        for place, block in blocks(vectors):
            require_unit(block, np.arange(place.start, place.stop), where)
            scores = block @ self.weights
            scores *= (-2 / lengths(block))[:, None]
            scores += self.offsets
            nearest[place] = scores.argmin(axis=1)
        return nearest


def fit_clusters(
    vectors: np.ndarray, num_clusters: int, seed: int, where: str, variance: float = PCA_VARIANCE
) -> Clusters:
    """Principal components of all vectors, then k-means (faiss) in them.

    Args:
        vectors: float16 [rows, dimensions], unit vectors; a memmap is read once in blocks, and at
            most POINTS_PER_CLUSTER · num_clusters of its rows a second time for k-means.
        num_clusters: at most as many as there are rows.
        seed: decides those rows and the first centroids.
        where: names the vectors in a message.
        variance: share of the variance that the components keep.

    Raises:
        UsageError: fewer vectors than clusters, or a row is not a unit vector.
    """
    if len(vectors) < num_clusters:
        raise UsageError(
            f"{where} holds {len(vectors):,} vectors, too few for {num_clusters:,} clusters; "
            "lower --num_bins"
        )
    mean, covariance = moments(vectors, where)
    components = principal_components(covariance, variance)
    points = projected_sample(vectors, mean, components, POINTS_PER_CLUSTER * num_clusters, seed)
    centroids = kmeans(points, num_clusters, seed).astype(np.float64)
    weights = np.rint(components @ centroids.T / WEIGHT_UNIT) * WEIGHT_UNIT
    offsets = (centroids**2).sum(axis=1) + 2 * (mean @ weights)
    return Clusters(weights, offsets, components.shape[1])


def moments(vectors: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [dimensions] and covariance [dimensions, dimensions] of the vectors at length 1."""
    dimensions = vectors.shape[1]
    total, products = np.zeros(dimensions), np.zeros((dimensions, dimensions))
    for place, block in blocks(vectors):
        require_unit(block, np.arange(place.start, place.stop), where)
        block /= lengths(block)[:, None]
        total += block.sum(axis=0)
        products += block.T @ block
    mean = total / len(vectors)
    return mean, products / len(vectors) - np.outer(mean, mean)


def principal_components(covariance: np.ndarray, variance: float) -> np.ndarray:
    """The fewest eigenvectors [dimensions, components] that keep a share of the variance."""
    values, eigenvectors = np.linalg.eigh(covariance)
    shares = np.cumsum(np.maximum(values[::-1], 0))
    count = int(np.searchsorted(shares, variance * shares[-1])) + 1
    return np.ascontiguousarray(eigenvectors[:, ::-1][:, :count])


def projected_sample(
    vectors: np.ndarray, mean: np.ndarray, components: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """At most `count` random rows in principal components: float32 [rows, components]."""
    rows = np.arange(len(vectors))
    if count < len(vectors):
        # In the order of the file, which is how a disk likes to be read.
        rows = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
    points = np.empty((len(rows), components.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = vectors[rows[start : start + BLOCK_ROWS]].astype(np.float64)
        points[start : start + BLOCK_ROWS] = (block / lengths(block)[:, None] - mean) @ components
    return points


def kmeans(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Centroids [clusters, components] of faiss's k-means."""
    import faiss

    algorithm = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=KMEANS_ITERATIONS,
        seed=seed,
        # All points that are given, however few: the choice was made before.
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
    )
    algorithm.train(points)
    assert algorithm.centroids is not None
    return algorithm.centroids
