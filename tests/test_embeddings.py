"""The folder of embeddings: what cannot be used is refused in one line."""

import numpy as np
import pytest

from resample_with_dp_histogram.embeddings import open_embeddings, require_same_model, require_unit
from tests.resampling import save_embeddings, unit_vectors
from utils.cli import UsageError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_embedded": 3}, "holds 3 of 9 embeddings; the same embed command goes on"),
        ({"num_texts": 8}, r"holds float16 \[9, 16\], but .* says float16 \[8, 16\]"),
        ({"dimensions": 7}, r"says float16 \[9, 7\]"),
    ],
)
def test_a_count_that_does_not_fit_is_refused(tmp_path, changes, message):
    save_embeddings(tmp_path, unit_vectors(9), private=False, **changes)
    with pytest.raises(UsageError, match=message):
        open_embeddings(tmp_path, private=False)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no embeddings at .*embed --private"):
        open_embeddings(tmp_path, private=True)
    save_embeddings(tmp_path, unit_vectors(9), private=False)
    np.save(tmp_path / "embeddings.npy", unit_vectors(9).astype(np.float32))
    with pytest.raises(UsageError, match="holds float32"):
        open_embeddings(tmp_path, private=False)
    content = (tmp_path / "embeddings.npy").read_bytes()
    (tmp_path / "embeddings.npy").write_bytes(content[:200])
    with pytest.raises(UsageError, match="cannot be read"):
        open_embeddings(tmp_path, private=False)
    (tmp_path / "embeddings.npy").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        open_embeddings(tmp_path, private=False)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        open_embeddings(tmp_path, private=False)


@pytest.mark.parametrize("changes", [{"model_fingerprint": "other"}, {"dimensions": 3}])
def test_embeddings_of_two_models_do_not_compare(tmp_path, changes):
    one = save_embeddings(tmp_path / "one", unit_vectors(9), private=False)
    width = changes.get("dimensions", 16)
    other = save_embeddings(tmp_path / "other", unit_vectors(9)[:, :width], private=True, **changes)
    with pytest.raises(UsageError, match="embed both with the same model"):
        require_same_model(
            open_embeddings(one, private=False), open_embeddings(other, private=True)
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.9])
def test_a_row_that_is_no_unit_vector_is_named(value):
    block = unit_vectors(5).astype(np.float64)
    require_unit(block, np.arange(5), "here")
    block[3] *= value
    with pytest.raises(UsageError, match=r"here, row 13 \(from 0\) is not a unit vector"):
        require_unit(block, np.arange(10, 15), "here")
