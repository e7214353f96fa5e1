"""MAUVE beside the published package, which gets an environment of its own (`-m mauve`).

The package is under the GPL: it is installed for this comparison alone, and nothing of the project
imports it.
"""

import json
import subprocess

import numpy as np
import pytest

from evaluation.measures.mauve import FRONTIER_POINTS, mauve
from tests.helpers import python_with
from tests.resampling import unit_vectors

NUM_SEEDS, ROWS, CLUSTERS = 5, 1000, 100
EVEN, SKEWED = np.full(6, 1 / 6), np.array([0.7, 0.1, 0.1, 0.05, 0.03, 0.02])
# From one distribution to none in common.
PAIRS = {
    "same": lambda rows: rows(EVEN),
    "near": lambda rows: rows(0.8 * EVEN + 0.2 * SKEWED),
    "skewed": lambda rows: rows(0.5 * EVEN + 0.5 * SKEWED),
    "far": lambda rows: rows(SKEWED),
    "opposite": lambda rows: -rows(EVEN),
}
PUBLISHED = """
import json, sys
import numpy as np
from mauve import compute_mauve

sets = np.load("sets.npz")
num_seeds, settings = json.loads(sys.argv[1])
print(json.dumps({
    name: [
        compute_mauve(sets["reference"], sets[name], seed=seed, **settings).mauve
        for seed in range(num_seeds)
    ]
    for name in sets.files if name != "reference"
}))
"""


@pytest.fixture(scope="module")
def published_python(tmp_path_factory):
    """Python of an environment with mauve-text."""
    return python_with(tmp_path_factory.mktemp("mauve") / "venv", "mauve-text==0.4.0")


@pytest.mark.mauve
@pytest.mark.timeout(1800)
def test_scores_are_those_of_the_published_package(published_python, tmp_path):
    """Our mean over seeds lies between its lowest and highest, give or take our own deviation."""
    reference = unit_vectors(ROWS, seed=1)
    sets = {
        name: make(lambda weights: unit_vectors(ROWS, seed=2, weights=weights))
        for name, make in PAIRS.items()
    }
    np.savez(
        tmp_path / "sets.npz",
        reference=reference.astype(np.float32),
        **{name: rows.astype(np.float32) for name, rows in sets.items()},
    )
    # Its scaling factor, k-means and PCA are the package's defaults.
    settings = {
        "num_buckets": CLUSTERS, "divergence_curve_discretization_size": FRONTIER_POINTS,
    }  # fmt: skip
    done = subprocess.run(
        [published_python, "-c", PUBLISHED, json.dumps([NUM_SEEDS, settings])],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    published = json.loads(done.stdout.splitlines()[-1])
    for name, rows in sets.items():
        ours = [mauve(reference, rows, seed, CLUSTERS) for seed in range(NUM_SEEDS)]
        mean, deviation = np.mean(ours), np.std(ours, ddof=1)
        theirs = published[name]
        print(
            f"{name:<10} ours {mean:.4f} (deviation {deviation:.4f}), published "
            f"{np.mean(theirs):.4f}, from {min(theirs):.4f} to {max(theirs):.4f}"
        )
        # Disjoint sets have no spread in either, but for the last digits.
        margin = deviation + 1e-4
        assert min(theirs) - margin <= mean <= max(theirs) + margin, name
