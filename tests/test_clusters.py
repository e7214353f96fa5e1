"""Clusters: recovered where they are plain, and a row's cluster a function of that row alone."""

from fractions import Fraction

import numpy as np
import pytest

from resample_with_dp_histogram import clusters
from resample_with_dp_histogram.clusters import WEIGHT_UNIT, Clusters, fit_clusters
from tests.resampling import DIMENSIONS, unit_vectors
from utils.cli import UsageError


@pytest.fixture(scope="module")
def fitted():
    return fit_clusters(unit_vectors(400), 6, 0, "pool")


def test_separate_groups_become_clusters():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 40)
    vectors = np.eye(DIMENSIONS)[groups] + 0.02 * random.normal(size=(200, DIMENSIONS))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    bins = fit_clusters(vectors, 5, 0, "pool").assign(vectors, "pool")
    assert len({(group, bin) for group, bin in zip(groups, bins)}) == 5


def test_the_nearest_centroid_in_principal_components_is_found():
    pool, rows = unit_vectors(400), unit_vectors(100, seed=1)
    mean, covariance = clusters.moments(pool, "pool")
    unit = pool / np.linalg.norm(pool.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(mean, unit.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(unit.T, bias=True), atol=1e-12)
    components = clusters.principal_components(covariance, 0.9)
    points = clusters.projected_sample(pool, mean, components, 1000, 0)
    np.testing.assert_allclose(points, (unit - mean) @ components, atol=1e-6)
    centroids = clusters.kmeans(points, 6, 0)
    wide = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    distances = (((wide - mean) @ components)[:, None] - centroids[None]) ** 2
    bins = fit_clusters(pool, 6, 0, "pool").assign(rows, "rows")
    np.testing.assert_array_equal(bins, distances.sum(-1).argmin(1))


def test_components_keep_the_variance_and_no_more_than_that():
    covariance = np.diag([0.05, 5.0, 0.95, 4.0])
    components = clusters.principal_components(covariance, 0.9)
    np.testing.assert_allclose(np.abs(components.T), [[0, 1, 0, 0], [0, 0, 0, 1]])
    assert clusters.principal_components(covariance, 0.91).shape == (4, 3)
    assert clusters.principal_components(np.zeros((4, 4)), 0.9).shape == (4, 1)


def test_scores_are_exact_so_no_order_of_addition_changes_them(fitted):
    """The guarantee of `Clusters`: fails if weights keep all their bits, or the sums lose some."""
    vectors = unit_vectors(64, seed=2)
    sums = vectors.astype(np.float64) @ fitted.weights
    for row, total in zip(vectors[:8], sums):
        exact = [
            sum(Fraction(float(x)) * Fraction(w) for x, w in zip(row, weights))
            for weights in fitted.weights.T
        ]
        assert [Fraction(value) for value in total] == exact
    order = np.random.default_rng(0).permutation(DIMENSIONS)
    again = vectors.astype(np.float64)[:, order] @ fitted.weights[order]
    np.testing.assert_array_equal(again, sums)
    # Worst case of the bound: every product positive, at the longest centroid there is.
    x = np.full((1, 768), 768**-0.5, dtype=np.float16)
    w = np.rint(np.full(768, 2 * 768**-0.5) / WEIGHT_UNIT) * WEIGHT_UNIT
    exact = 768 * Fraction(float(x[0, 0])) * Fraction(w[0])
    assert Fraction((x.astype(np.float64) @ w)[0]) == exact
    assert exact / (Fraction(1, 2**50)) < 2**53


def test_a_row_between_two_clusters_stays_in_its_bin_whoever_leaves():
    """Ties are where rounding would show: rows half-way between two centroids, in any company."""
    random = np.random.default_rng(3)
    one = unit_vectors(1, seed=5)[0].astype(np.float64)
    directions = random.normal(size=(DIMENSIONS, 200))
    # Every cluster has a twin at the same distance from each row along `one`, but for one unit.
    weights = np.rint((one[:, None] + 1e-3 * directions) / WEIGHT_UNIT) * WEIGHT_UNIT
    tied = Clusters(weights, 2 * (one.astype(np.float16) @ weights), 1)
    rows = np.repeat(one.astype(np.float16)[None], 700, axis=0)
    rows[1::2] = unit_vectors(350, seed=6)
    whole = tied.assign(rows, "rows")
    for left_out in (0, 1, 349, 698):
        np.testing.assert_array_equal(
            tied.assign(np.delete(rows, left_out, axis=0), "rows"), np.delete(whole, left_out)
        )


def test_blocks_do_not_matter(fitted, monkeypatch):
    rows = unit_vectors(300, seed=4)
    whole = fitted.assign(rows, "rows")
    monkeypatch.setattr(clusters, "blocks", lambda vectors: iter_blocks(vectors, 7))
    np.testing.assert_array_equal(fitted.assign(rows, "rows"), whole)
    again = fit_clusters(unit_vectors(400), 6, 0, "pool")
    np.testing.assert_allclose(again.weights, fitted.weights, atol=1e-6)


def iter_blocks(vectors, rows):
    from resample_with_dp_histogram.embeddings import blocks

    return blocks(vectors, rows)


def test_the_same_seed_gives_the_same_clusters_and_another_one_others(fitted):
    again = fit_clusters(unit_vectors(400), 6, 0, "pool")
    np.testing.assert_array_equal(again.weights, fitted.weights)
    other = fit_clusters(unit_vectors(400), 6, 1, "pool")
    assert not np.array_equal(other.weights, fitted.weights)


def test_k_means_reads_a_sample_of_a_large_pool(monkeypatch):
    monkeypatch.setattr(clusters, "POINTS_PER_CLUSTER", 20)
    given = []
    kmeans = clusters.kmeans
    monkeypatch.setattr(clusters, "kmeans", lambda *a: given.append(a[0].shape) or kmeans(*a))
    found = fit_clusters(unit_vectors(400), 6, 0, "pool")
    assert given == [(120, found.num_components)]


def test_fewer_vectors_than_clusters_and_damaged_ones_are_refused():
    vectors = unit_vectors(5)
    with pytest.raises(UsageError, match="5 vectors, too few for 6 clusters; lower --num_bins"):
        fit_clusters(vectors, 6, 0, "pool")
    assert fit_clusters(vectors, 5, 0, "pool").weights.shape == (DIMENSIONS, 5)
    vectors[2, 3] = np.nan
    with pytest.raises(UsageError, match=r"pool, row 2 \(from 0\)"):
        fit_clusters(vectors, 2, 0, "pool")
