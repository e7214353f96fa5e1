"""The folder of embeddings that `embed` fills and `resample` reads.

embeddings.npy   float16 [texts, dimensions], unit vectors in the order of the texts, memory-mapped
manifest.json    the model, the texts (number and hash), and how many are embedded

Those of private texts lie in the folder's private/, which must stay where it is, with
identity.json, the fingerprint of the rows that runs and histograms of one data set share; and
units.npy, int64 [texts], whose each text is, if `embed` was to read that.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli import UsageError
from utils.files import write_json
from utils.folders import require_same_settings

DEFAULT_MODEL = "sentence-transformers/sentence-t5-base"
VECTORS_FILE, UNITS_FILE, MANIFEST_FILE = "embeddings.npy", "units.npy", "manifest.json"
PRIVATE_FOLDER, IDENTITY_FILE = "private", "identity.json"
# Rounding to float16 moves the length of a unit vector by less than 2^-11.
UNIT_TOLERANCE = 2.0**-10
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Embeddings:
    """A finished folder.

    Attributes:
        vectors: float16 [texts, dimensions], memory-mapped and read-only.
        manifest: what is known of them.
        units: int64 [texts], the number of the unit that a text belongs to; None where every text
            is a unit of its own.
    """

    folder: Path
    vectors: np.ndarray
    manifest: dict
    units: np.ndarray | None

    @property
    def num_examples(self) -> int:
        """N: the units, or the texts where each is one."""
        return len(self.vectors if self.units is None else np.unique(self.units))


def location(folder: Path, private: bool) -> Path:
    """Where in `folder` the files are."""
    return folder / PRIVATE_FOLDER if private else folder


def write_identity(folder: Path, rows_fingerprint: str) -> None:
    """Note in a private folder whose rows its histogram or its embeddings were computed from.

    Args:
        rows_fingerprint: see `utils.texts.data_sets.rows_fingerprint`.
    """
    write_json(folder / IDENTITY_FILE, {"rows_fingerprint": rows_fingerprint})


def units_digest(units: np.ndarray) -> str:
    """A hash of the units of rows. Of private rows: for `private/` alone."""
    return hashlib.sha256(units.tobytes()).hexdigest()


def read_manifest(folder: Path, private: bool) -> dict | None:
    """The manifest of what `embed` wrote to `folder`; None if there is none.

    Raises:
        UsageError: it holds embeddings of the other kind, or no manifest can be read.
    """
    if (location(folder, not private) / MANIFEST_FILE).exists():
        is_kind, kind = ("public", "private") if private else ("private", "public")
        raise UsageError(
            f"{folder} holds embeddings that were made as {is_kind} ones, not as {kind} ones; "
            "only private texts may move the histogram and only synthetic ones the clusters"
        )
    path = location(folder, private) / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError):
        manifest = None
    names = ("num_texts", "num_embedded", "dimensions")
    known = isinstance(manifest, dict) and all(type(manifest.get(name)) is int for name in names)
    if not known:
        raise UsageError(
            f"{path} is not JSON of embed's; make the embeddings again in another folder"
        )
    return manifest


def open_vectors(folder: Path, manifest: dict, mode: str) -> np.memmap:
    """Map the vectors next to a manifest into memory.

    Args:
        folder: where both lie.
        mode: "r", or "r+" to go on with them.

    Raises:
        UsageError: the file is missing, damaged or of another count than its manifest's.
    """
    path = folder / VECTORS_FILE
    try:
        vectors = np.lib.format.open_memmap(path, mode=mode)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; embed the texts again") from None
    expected = (manifest["num_texts"], manifest["dimensions"])
    if vectors.dtype != np.float16 or vectors.shape != expected:
        raise UsageError(
            f"{path} holds {vectors.dtype} {list(vectors.shape)}, but {MANIFEST_FILE} "
            f"next to it says float16 {list(expected)}; embed the texts again"
        )
    return vectors


def open_units(folder: Path, manifest: dict) -> np.ndarray | None:
    """Read the units next to a manifest: int64 [texts], or None if the manifest knows of none.

    Raises:
        UsageError: the file is missing, damaged or another than its manifest's.
    """
    if manifest.get("unit_column") is None:
        return None
    path = folder / UNITS_FILE
    try:
        units = np.load(path)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; embed the texts again") from None
    if units_digest(units) != manifest["units_sha256"]:
        raise UsageError(
            f"{path} holds other units than {MANIFEST_FILE} next to it says; embed the texts again"
        )
    return units


def open_embeddings(folder: Path, private: bool) -> Embeddings:
    """Open what `embed` has finished.

    Raises:
        UsageError: nothing is there, it is of the other kind, unfinished or damaged.
    """
    manifest = read_manifest(folder, private)
    if manifest is None:
        flag = "--private" if private else "--synthetic"
        raise UsageError(
            f"no embeddings at {folder}; make them with python -m "
            f"resample_with_dp_histogram.embed {flag} --output {folder} --instructions ..."
        )
    done, count = manifest["num_embedded"], manifest["num_texts"]
    if done < count:
        raise UsageError(
            f"{folder} holds {done:,} of {count:,} embeddings; the same embed command goes on"
        )
    place = location(folder, private)
    vectors, units = open_vectors(place, manifest, "r"), open_units(place, manifest)
    return Embeddings(folder, vectors, manifest, units)


def require_same_model(one: Embeddings, other: Embeddings) -> None:
    """Raise a UsageError unless both were made by one model."""
    names = ("model_fingerprint", "dimensions")
    require_same_settings(
        {name: one.manifest[name] for name in names},
        {name: other.manifest[name] for name in names},
        f"{one.folder} was embedded by {one.manifest['model']} and {other.folder} by "
        f"{other.manifest['model']}, with",
        "embed both with the same model",
    )


def blocks(vectors: np.ndarray, rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield `vectors` in blocks of float64 [rows, dimensions], each with its place."""
    for start in range(0, len(vectors), rows):
        place = slice(start, min(start + rows, len(vectors)))
        yield place, vectors[place].astype(np.float64)


def lengths(block: np.ndarray) -> np.ndarray:
    """The l2 norm of every row.

    Exact for rows of float16 unit vectors up to the square root: their squares are multiples of
    2^-48 and add up to less than 2, which float64 holds in whatever order they are added.
    """
    return np.sqrt(np.einsum("nd,nd->n", block, block))


def require_unit(block: np.ndarray, rows: np.ndarray, where: str) -> None:
    """Raise a UsageError that names the first row that is not a unit vector (NaN included).

    Args:
        block: float64 [rows, dimensions].
        rows: the number of each row, for the message.
    """
    wrong = rows[~(np.abs(lengths(block) - 1) < UNIT_TOLERANCE)]
    if len(wrong):
        raise UsageError(
            f"{where}, row {wrong[0]} (from 0) is not a unit vector: NaN, infinite, zero or not of "
            "embed's making; embed the texts again"
        )
