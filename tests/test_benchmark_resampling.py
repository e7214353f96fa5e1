"""The benchmark of resampling, at a tiny size."""

import json

import numpy as np
import pytest

from benchmarks import resampling
from resample_with_dp_histogram.embeddings import open_embeddings


def test_the_quick_benchmark_prints_and_writes_what_it_measured(tmp_path, capsys):
    assert resampling.main(["--quick", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["sizes"] == resampling.QUICK
    assert 0 < results["seconds"] < 120
    assert 50 << 20 < results["peak_bytes"] < 4 << 30
    assert 1 < results["principal_components"] < 32
    distance = results["total_variation"]
    assert distance["selected"] < distance["synthetic"]
    shown = capsys.readouterr().out
    assert "3,000 x 900" in shown
    assert f"time                 {results['seconds']:.0f} s" in shown


@pytest.mark.parametrize(
    ("seconds", "peak", "code"), [(1801, 1 << 30, 1), (60, 7 << 30, 1), (60, 1 << 30, 0)]
)
def test_too_slow_or_too_large_is_exit_code_1(monkeypatch, seconds, peak, code):
    results = {
        "sizes": resampling.FULL, "seconds": seconds, "peak_bytes": peak,
        "principal_components": 3, "cores": 1,
        "total_variation": {"synthetic": 0.5, "selected": 0.1},
    }  # fmt: skip
    monkeypatch.setattr(resampling, "benchmark", lambda sizes: results)
    assert resampling.main([]) == code


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit) as ended:
        resampling.measured(["false"])
    assert ended.value.code == 1


def test_the_data_has_the_shape_of_embeddings(tmp_path):
    sizes = {"synthetic": 2000, "private": 500, "dimensions": 64, "bins": 10}
    resampling.write_data(tmp_path, sizes)
    vectors = open_embeddings(tmp_path / "synthetic", private=False).vectors.astype(np.float64)
    assert vectors.shape == (2000, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    private = open_embeddings(tmp_path / "private", private=True).vectors
    assert private.shape == (500, 64)
    variances = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert variances[0] > 5 * variances[32] > 0
