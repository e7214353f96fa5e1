"""Small embeddings and a small sentence encoder, for tests of resampling."""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.resampling import write_embeddings
from resample_with_dp_histogram.embeddings import MANIFEST_FILE, UNITS_FILE, location, units_digest
from utils.files import write_json

DIMENSIONS = 16


def unit_vectors(rows: int, seed: int = 0, groups: int = 6, weights=None) -> np.ndarray:
    """float16 unit vectors [rows, DIMENSIONS] around `groups` directions, drawn by `weights`."""
    centres = np.random.default_rng(99).normal(size=(groups, DIMENSIONS))
    random = np.random.default_rng(seed)
    vectors = centres[random.choice(groups, rows, p=weights)]
    vectors = vectors + 0.5 * random.normal(size=vectors.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def save_embeddings(
    folder: Path, vectors: np.ndarray, *, private: bool, texts=(), units=None, **changes
):
    """Write what `embed` writes; `changes` replace entries of the manifest."""
    write_embeddings(folder, [vectors], vectors.shape, list(texts), private=private)
    if units is not None:
        np.save(location(folder, private) / UNITS_FILE, units)
        changes = {"unit_column": "person", "units_sha256": units_digest(units)} | changes
    if changes:
        path = location(folder, private) / MANIFEST_FILE
        write_json(path, json.loads(path.read_text()) | changes)
    return folder


def save_tiny_encoder(folder: Path, seed: int = 0) -> str:
    """Save a random one-layer T5 encoder with mean pooling, as sentence-t5 is built."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder / "encoder")
    ByT5Tokenizer().save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return str(folder / "model")
