"""Embed texts with a sentence encoder into a memory-mapped float16 file.

    python -m resample_with_dp_histogram.embed --synthetic \\
        --instructions synthetic/mine/instructions.jsonl --output embeddings/mine
    python -m resample_with_dp_histogram.embed --private \\
        --instructions data/chatbot_arena_instructions_train180k --split train \\
        --output embeddings/chatbot_arena

With --private everything goes to OUTPUT/private/, since an embedding gives its text away; embed
the very split that was trained on, so that both have one N. Texts of similar length share a
batch, the longest first. A stopped run goes on with the same command, on any number of devices.

Add --unit_column, such as user_id, where a person may have several rows: resample then protects
all rows of one person together.
"""

from dataclasses import dataclass
from pathlib import Path

from resample_with_dp_histogram.embeddings import DEFAULT_MODEL
from utils.cli import end_on_stops
from utils.command_line.parser import command_line, flag, parser_of
from utils.texts.text_inputs import FORMATS
from utils.texts.units import OWNERS


@dataclass(frozen=True, kw_only=True)
class _Flags:
    """The flags of `embed` that go without each other."""

    instructions: str = flag(f"the texts: {FORMATS}", required=True, metavar="PATH")
    split: str | None = flag("the split to read where --instructions is a saved DatasetDict")
    output: Path = flag(
        "folder for the embeddings; give the same one again to go on after a stop",
        required=True,
        type=Path,
        metavar="DIR",
    )
    model: str = flag("a sentence-transformers hub id or folder", DEFAULT_MODEL)
    unit_column: str | None = flag(
        "with --private: column that says whose a row is, such as user_id, kept with the "
        "embeddings; resample then takes the same flag, and its guarantee is for all rows of one "
        "person (or whatever the column tells apart)"
    )
    owner: str | None = flag(
        "which owner counts where --unit_column holds lists, which are refused otherwise; the row "
        "does not count as the others', so it is not protected as theirs",
        choices=OWNERS,
    )
    unowned_rows_are_units: bool = flag(
        "rows without a value in --unit_column are units of their own; they are refused otherwise",
        False,
    )
    batch_size: int = flag("texts in a batch on one device", 64)
    devices: list[str] | None = flag(
        "one process each, such as cuda:0 cuda:1; all GPUs if left out, or else the CPU",
        nargs="+",
        metavar="DEVICE",
    )


@dataclass(frozen=True, kw_only=True)
class Settings(_Flags):
    """All flags of `embed`: exactly one of these two is set."""

    private: bool
    synthetic: bool


def read_settings(argv: list[str] | None) -> Settings:
    """The flags. That one of two is required is what `flag` cannot say."""
    parser = parser_of(_Flags, __doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--private", action="store_true", help="the texts are private: write to OUTPUT/private/"
    )
    kind.add_argument("--synthetic", action="store_true", help="the texts may be shown to anyone")
    return Settings(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    end_on_stops()
    read_settings(None)

import io
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from resample_with_dp_histogram.embeddings import (
    IDENTITY_FILE,
    MANIFEST_FILE,
    UNITS_FILE,
    VECTORS_FILE,
    location,
    open_vectors,
    read_manifest,
    require_unit,
    units_digest,
    write_identity,
)
from utils.cli import UsageError, in_one_line, run_cli, say
from utils.files import fsync_folder, write_atomic, write_json
from utils.folders import (
    locked,
    names_in,
    private_folder,
    require_same_settings,
    sibling_lock,
)
from utils.models.loading import model_fingerprint
from utils.progress import Progress
from utils.texts.data_sets import rows_fingerprint
from utils.texts.text_inputs import read_column, read_instructions
from utils.texts.units import read_units, require_column

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Batches that a device gets at once, and the least time between two saves.
BATCHES_AT_ONCE = 8
IN_MEMORY_AT_ONCE = 512  # texts
SAVE_SECONDS = 5.0


def command_of(settings: Settings) -> list[str]:
    """The words of the command that `settings` are of."""
    kind = "--private" if settings.private else "--synthetic"
    return [*command_line("resample_with_dp_histogram.embed", _Flags, settings), kind]


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(argv)
    check_unit_flags(settings)
    texts = read_instructions(settings.instructions, settings.split)
    units = read_text_units(settings) if settings.unit_column is not None else None
    folder = location(settings.output, settings.private)
    with locked(settings.output, "use another --output", sibling_lock(settings.output)):
        model = load_model(settings.model)
        facts = {
            "texts_sha256": rows_fingerprint(texts),
            "model_fingerprint": model_fingerprint(model),
            "unit_column": settings.unit_column,
            "owner": settings.owner,
            "units_sha256": None if units is None else units_digest(units),
        }
        noted = {
            "model": settings.model,
            "num_texts": len(texts),
            "dimensions": model.get_embedding_dimension(),
            "commands": [command_of(settings)],
        }
        manifest = manifest_of(
            settings.output, settings.private, facts, noted, "use another --output"
        )
        begin(folder, settings.private, manifest, units)
        devices = settings.devices or default_devices()
        embed(texts, model, folder, manifest, settings.batch_size, devices)
    say(f"{len(texts):,} embeddings of {manifest['dimensions']} dimensions are in {folder}")


def load_model(name: str) -> "SentenceTransformer":
    """Load a SentenceTransformer on the CPU.

    Raises:
        UsageError: there is none of that name.
    """
    import sentence_transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return sentence_transformers.SentenceTransformer(
            name, device="cpu", trust_remote_code=False
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = in_one_line(error, 200)
        raise UsageError(
            f"the encoder {name!r} is not a sentence-transformers folder, and could not be fetched "
            f"from the hub ({reason})"
        ) from None


def check_unit_flags(settings: Settings) -> None:
    """Refuse flags of a unit that have nothing to say."""
    if settings.unit_column is not None and not settings.private:
        raise UsageError(
            f"--unit_column {settings.unit_column} needs --private: a synthetic text is nobody's"
        )
    require_column(settings.unit_column, settings.owner, settings.unowned_rows_are_units)


def read_text_units(settings: Settings) -> np.ndarray:
    """The unit of each text: int64 [texts].

    Raises:
        UsageError: see `read_column` and `read_units`.
    """
    import pyarrow

    column = settings.unit_column
    assert column is not None
    values = read_column(settings.instructions, settings.split, column)
    try:
        table = pyarrow.table({column: values})
    except (pyarrow.ArrowException, OverflowError):
        # The library's own message shows a value, which is private.
        raise UsageError(
            f"--unit_column {column}: {settings.instructions} has values of several types in it; "
            "use one type"
        ) from None
    return read_units(
        table,
        column,
        owner=settings.owner,
        unowned_rows_are_units=settings.unowned_rows_are_units,
    )


def manifest_of(output: Path, private: bool, facts: dict, noted: dict, remedy: str) -> dict:
    """The manifest to go on with, or a new one where nothing has begun.

    Args:
        output: see `location`.
        facts: what an embedding, or what is made of it, follows from; all must be as they were.
        noted: what else a new one says: `model`, `num_texts`, `dimensions`.
        remedy: what a refused user can do, see `require_same_settings`.

    Raises:
        UsageError: other facts, or a folder that is none of embeddings.
    """
    begun, folder = read_manifest(output, private), location(output, private)
    # A run that was killed while it began has left these and nothing else.
    if begun is None and names_in(folder) - {"README.md", IDENTITY_FILE, UNITS_FILE}:
        raise UsageError(f"{folder} holds something else than embeddings; {remedy}")
    if begun is None:
        return {**facts, **noted, "num_embedded": 0}
    require_same_settings(
        {name: begun.get(name) for name in facts},
        facts,
        f"{output} holds embeddings ({begun['num_texts']:,} texts, {begun['model']}) with",
        remedy,
        shown=False,
    )
    return begun


def begin(folder: Path, private: bool, manifest: dict, units: np.ndarray | None = None) -> None:
    """Make the folder and the manifest that says whose it is."""
    if private:
        private_folder(folder)
        write_identity(folder, manifest["texts_sha256"])
    folder.mkdir(parents=True, exist_ok=True)
    if units is not None:
        # Not by its name: numpy's own way of writing to a file does not say that a disk is full.
        content = io.BytesIO()
        np.save(content, units)
        write_atomic(folder / UNITS_FILE, content.getvalue())
    write_json(folder / MANIFEST_FILE, manifest)


def make_vectors(folder: Path, shape: tuple[int, int]) -> np.memmap:
    """A new file of zeros, float16 [texts, dimensions], for which the disk has room."""
    file = folder / VECTORS_FILE
    made = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        # A full disk is an error here; of a sparse file it would be a bus error later.
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
    fsync_folder(folder)
    return made


def embed(
    texts: list[str],
    model: "SentenceTransformer",
    folder: Path,
    manifest: dict,
    batch_size: int,
    devices: list[str],
) -> None:
    """Embed what is missing, the longest text first, and note after each save how far it came.

    Args:
        batch_size: texts in a batch on one device; with 1, a vector depends on its text, the model
            and the kind of device alone, to the last bit.
        devices: one process each.

    Raises:
        UsageError: the model gives a text no direction (NaN or zero); its row is named.
    """
    done = manifest["num_embedded"]
    if done == 0:
        make_vectors(folder, (manifest["num_texts"], manifest["dimensions"]))
    vectors = open_vectors(folder, manifest, "r+")
    # Known from the texts alone, so that a later run finds the same first `num_embedded` done.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    rows_at_once = BATCHES_AT_ONCE * batch_size * len(devices)
    pool = model.start_multi_process_pool(devices) if len(devices) > 1 else None
    saved_at = time.monotonic()
    try:
        with Progress(None, "embed", unit="text", total=len(texts), initial=done) as progress:
            for start in range(done, len(texts), rows_at_once):
                rows = order[start : start + rows_at_once]
                embeddings = model.encode(
                    [texts[row] for row in rows],
                    batch_size=batch_size,
                    show_progress_bar=False,
                    **({"pool": pool} if pool else {"device": devices[0]}),
                )
                vectors[rows] = unit_vectors(embeddings, rows, str(folder))
                progress.update(len(rows))
                now = time.monotonic()
                if now - saved_at >= SAVE_SECONDS or progress.n == len(texts):
                    vectors.flush()
                    write_json(folder / MANIFEST_FILE, manifest | {"num_embedded": progress.n})
                    saved_at = now
    finally:
        if pool:
            model.stop_multi_process_pool(pool)


def unit_vectors(embeddings: np.ndarray, rows: np.ndarray, where: str) -> np.ndarray:
    """L2-normalise and round to float16.

    Args:
        embeddings: [texts, dimensions].
        rows: the number of each text, for the message.

    Raises:
        UsageError: a text has no direction (NaN, infinite or zero); its row is named.
    """
    wide = embeddings.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unit = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    require_unit(unit.astype(np.float64), rows, where)
    return unit


def embed_in_memory(
    texts: list[str], rows: np.ndarray, model: "SentenceTransformer", where: str
) -> np.ndarray:
    """Embed some texts on one device, and write nothing.

    Args:
        rows, where: see `unit_vectors`.

    Returns:
        float16 [texts, dimensions], unit vectors.

    Raises:
        UsageError: see `unit_vectors`.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    starts = range(0, len(texts), IN_MEMORY_AT_ONCE)
    embeddings = [
        model.encode(
            [texts[place] for place in order[start : start + IN_MEMORY_AT_ONCE]],
            show_progress_bar=False,
            device=default_devices()[0],
        )
        for start in Progress(starts, "embed", unit="block")
    ]
    return unit_vectors(np.concatenate(embeddings)[np.argsort(order)], rows, where)


def default_devices() -> list[str]:
    """Every GPU, or else the CPU."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def common_kind(devices: list[str]) -> str:
    """The kind of all devices, which decides the last bits of what they compute.

    Returns:
        The name of the GPU; of a CPU, the number of threads, too.

    Raises:
        UsageError: one is not here, or they are of several kinds.
    """
    kinds = set()
    for device in devices:
        try:
            kind = torch.device(device).type
            kinds.add(torch.cuda.get_device_name(device) if kind == "cuda" else kind)
        except (RuntimeError, AssertionError):  # not a device; no such GPU
            raise UsageError(
                f"--devices {device}: not here; leave the flag out for {default_devices()}"
            ) from None
    if len(kinds) > 1:
        raise UsageError(
            f"--devices {' '.join(devices)}: of several kinds ({', '.join(sorted(kinds))}), which "
            "round in other ways; name devices of one kind"
        )
    (kind,) = kinds
    return f"{kind}, {torch.get_num_threads()} threads" if kind == "cpu" else kind


if __name__ == "__main__":
    run_cli(main)
