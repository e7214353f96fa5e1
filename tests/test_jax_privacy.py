"""Correlated noise beside jax-privacy, which gets an environment of its own (`-m jax`)."""

import json
import os
import subprocess

import pytest

from tests.helpers import python_with
from utils.privacy.banded import band_coefficients, participations, prefix_error

# Bands and steps.
SIZES = [(1, 22), (4, 22), (22, 22), (8, 439), (32, 439)]
PUBLISHED = """
import json, sys
import jax.numpy as jnp
from jax_privacy.matrix_factorization import sensitivity, toeplitz

found = []
for coefficients, steps in json.loads(sys.argv[1]):
    bands, column = len(coefficients), jnp.array(coefficients)
    c = toeplitz.materialize_lower_triangular(column, steps)
    best = toeplitz.optimize_banded_toeplitz(steps, bands)
    found.append({
        "square": float(toeplitz.minsep_sensitivity_squared(column, bands, None, steps)),
        "dense": float(sensitivity.get_sensitivity_banded(c, min_sep=bands)) if bands > 1 else None,
        "error": float(jnp.mean(toeplitz.per_query_error(strategy_coef=column, n=steps))),
        "best": float(toeplitz.loss(best, steps)),
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def published_python(tmp_path_factory):
    """Python of an environment with jax-privacy."""
    return python_with(tmp_path_factory.mktemp("jax") / "venv", "jax-privacy==2.0.0")


@pytest.mark.jax
@pytest.mark.timeout(1800)
def test_sensitivities_and_errors_are_those_of_the_published_package(published_python, tmp_path):
    ours = [(band_coefficients(bands, steps), steps) for bands, steps in SIZES]
    done = subprocess.run(
        [published_python, "-c", PUBLISHED, json.dumps(ours)],
        cwd=tmp_path, check=True, capture_output=True, text=True,
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    published = json.loads(done.stdout.splitlines()[-1])
    for (coefficients, steps), theirs in zip(ours, published):
        bands = len(coefficients)
        times = participations(range(steps), bands)
        # Orthogonal columns: the square is their number, less what the end of the run cuts off.
        assert 0.7 * times < theirs["square"] <= times
        if theirs["dense"] is not None:
            assert theirs["dense"] <= times**0.5
        assert prefix_error(coefficients, steps) ** 2 == pytest.approx(theirs["error"], rel=1e-6)
        # Their search, of the same aim, finds nothing that is better by more than what is cut off.
        assert prefix_error(coefficients, steps) ** 2 <= 1.002 * theirs["best"]
        print(bands, steps, prefix_error(coefficients, steps) ** 2, theirs)
