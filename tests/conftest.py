"""Fixtures that every test may use: a random two-layer LLaMA, a byte-level tokenizer, datasets."""

import pytest

from tests import helpers


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Path (str) of a saved two-layer random LLaMA with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    helpers.save_tiny_model(folder)
    return str(folder)
