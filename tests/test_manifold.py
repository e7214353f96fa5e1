"""Neighbours of embeddings: definitions, a case by hand, closed forms, and ties."""

import math

import faiss
import numpy as np
import pytest

from evaluation.measures import manifold
from evaluation.measures.manifold import (
    mean_similarity,
    nearest_similarity,
    overlap,
    radii,
    squared_distances,
)
from tests.resampling import unit_vectors


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)


def isotropic(rows, seed, dimensions=32):
    vectors = np.random.default_rng(seed).normal(size=(rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def by_definition(real, other, k):
    """The four figures one ball and one row at a time, in float64."""

    def distance(a, b):
        return np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))

    def balls(rows):
        return [
            (a, sorted(distance(a, b) for j, b in enumerate(rows) if j != i)[k - 1])
            for i, a in enumerate(rows)
        ]

    def holds(ball, row):
        return distance(ball[0], row) <= ball[1]

    real_balls, other_balls = balls(real), balls(other)
    inside = [[holds(ball, row) for ball in real_balls] for row in other]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean([any(holds(ball, row) for ball in other_balls) for row in real]),
        "density": np.sum(inside) / (k * len(other)),
        "coverage": np.mean([any(column) for column in zip(*inside)]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_figures_are_those_of_their_definitions(k, monkeypatch):
    """With skew, sets of unlike sizes, repeated rows, and blocks that do not divide the rows."""
    monkeypatch.setattr(manifold, "BLOCK_ROWS", 7)
    real = unit_vectors(60, seed=1)
    other = unit_vectors(45, seed=2, weights=[0.6, 0.3, 0.1, 0, 0, 0])
    real[10:14], other[:5], other[5] = real[9], other[6], real[20]
    found = overlap(real, other, k)
    assert found == pytest.approx(by_definition(real, other, k), abs=1e-12)
    assert 0.02 < min(found.values()) < found["precision"] < 1
    assert found != pytest.approx(by_definition(other, real, k), abs=1e-3)


def test_a_case_by_hand():
    """Balls of 10, 10 and 40 degrees around the real rows, of 7, 7 and 168 around the others."""
    found = overlap(on_circle(0, 10, 50), on_circle(5, 12, 180), k=1)
    assert found == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "density": 4 / 3, "coverage": 1}
    )


def test_sets_of_one_distribution_have_density_1_and_known_coverage():
    rows, k = 2000, 5
    found = [overlap(isotropic(rows, 2 * s), isotropic(rows, 2 * s + 1), k) for s in range(4)]
    # No row of the other set among the k nearest of the 2m - 1 remaining rows.
    empty = math.comb(rows - 1, k) / math.comb(2 * rows - 1, k)
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - empty, abs=0.004)
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.04)
    # What k - 1 and k + 1 give is further away than that.
    assert abs(2.0**-4 - empty) > 0.012
    assert abs(2.0**-6 - empty) > 0.012


def test_what_goes_wrong_shows_where_it_should():
    real = unit_vectors(500, seed=1)
    control = overlap(real, unit_vectors(500, seed=2), 5)
    outliers = unit_vectors(500, seed=2)
    outliers[:250] *= -1
    found = overlap(real, outliers, 5)
    assert found["precision"] < 0.6 < 0.9 < control["precision"]
    assert found["density"] < 0.6
    two_groups_of_six = unit_vectors(500, seed=2, weights=[0.5, 0.5, 0, 0, 0, 0])
    found = overlap(real, two_groups_of_six, 5)
    assert found["precision"] > 0.8
    assert found["recall"] < 0.45
    assert found["coverage"] < 0.45


def test_repeated_rows_are_ties_and_count():
    """Balls of radius 0 hold what lies at their centre, whatever arithmetic does."""
    rows = isotropic(300, seed=1, dimensions=384)
    repeated = np.concatenate([rows, rows])
    assert (radii(repeated, 1) == 0).all()
    assert overlap(repeated, rows, 1) == {
        "precision": 1.0, "recall": 1.0, "density": 2.0, "coverage": 1.0,
    }  # fmt: skip
    assert (radii(rows, 1) > 0.1).all()


def test_neighbours_are_those_of_a_search_library():
    one, other = isotropic(400, seed=1), isotropic(300, seed=2)
    index = faiss.IndexFlatL2(one.shape[1])
    index.add(one.astype(np.float32))
    nearest, _ = index.search(one.astype(np.float32), 6)
    np.testing.assert_allclose(radii(one, 5), nearest[:, 5], rtol=1e-5)
    distances = np.concatenate([block for _, block in squared_distances(other, one)])
    expected, _ = index.search(other.astype(np.float32), len(one))
    np.testing.assert_allclose(np.sort(distances, axis=1), expected, rtol=1e-5)


def test_similarities_are_means_over_pairs():
    rows = unit_vectors(50, seed=1)
    wide = rows.astype(np.float64)
    cosines = wide @ wide.T / np.outer(*[np.linalg.norm(wide, axis=1)] * 2)
    different = cosines[~np.eye(50, dtype=bool)].reshape(50, 49)
    assert mean_similarity(rows) == pytest.approx(different.mean(), abs=1e-12)
    assert nearest_similarity(rows) == pytest.approx(different.max(axis=1).mean(), abs=5e-4)
    assert nearest_similarity(np.concatenate([rows, rows])) == 1
    assert mean_similarity(rows) < nearest_similarity(rows) - 0.1
