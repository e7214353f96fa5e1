"""Time and memory of resampling at the size of the paper.

    python -m benchmarks.resampling --json resampling.json
    python -m benchmarks.resampling --quick

Writes random embeddings to a temporary folder and runs the resample command on them: 1,000,000
synthetic and 180,000 private vectors of 768 dimensions, 1,000 clusters. The vectors scatter around
2,000 centres whose sizes follow Zipf's law, with a spectrum that falls as that of sentence
embeddings does; the private ones have other sizes. Peak memory is the command's resident set,
mapped files included. Exit code 1 if it takes more than 30 minutes or 6 GiB. Needs 3 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from resample_with_dp_histogram.embed import begin
from resample_with_dp_histogram.embeddings import VECTORS_FILE, location, texts_digest
from utils.cli import EXIT_FAILED, EXIT_OK, run_cli, say
from utils.command_line.parser import make_parser
from utils.files import write_json
from utils.versions import versions_of

MAX_SECONDS, MAX_BYTES = 30 * 60, 6 << 30
FULL = {"synthetic": 1_000_000, "private": 180_000, "dimensions": 768, "bins": 1000}
QUICK = {"synthetic": 3000, "private": 900, "dimensions": 32, "bins": 20}
NUM_CENTRES = 2000
BLOCK_ROWS = 20_000
# Length of a vector's own part over that of its centre, and the exponent of the spectrum.
SCATTER, SPECTRUM = 0.7, 0.5
VERSIONED = ("numpy", "faiss-cpu", "torch")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the benchmark")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write this")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    results = benchmark(QUICK if args.quick else FULL)
    sizes, distance = results["sizes"], results["total_variation"]
    seconds, peak = results["seconds"], results["peak_bytes"]
    rows = [
        ("synthetic x private", f"{sizes['synthetic']:,} x {sizes['private']:,}"),
        ("dimensions, kept", f"{sizes['dimensions']}, {results['principal_components']}"),
        ("clusters", f"{sizes['bins']:,}"),
        ("cores", f"{results['cores']}"),
        ("time", f"{seconds:.0f} s (at most {MAX_SECONDS} s)"),
        ("peak memory", f"{peak / 2**30:.2f} GiB (at most {MAX_BYTES / 2**30:.0f} GiB)"),
        ("distance, pool", f"{distance['synthetic']:.3f}"),
        ("distance, selected", f"{distance['selected']:.3f}"),
    ]
    for label, value in rows:
        print(f"{label:<20} {value}")
    if args.json:
        write_json(args.json, results)
    return EXIT_OK if seconds <= MAX_SECONDS and peak <= MAX_BYTES else EXIT_FAILED


def benchmark(sizes: dict) -> dict:
    """Run the resample command on data of some size; what was measured."""
    with tempfile.TemporaryDirectory(prefix="resampling-") as name:
        folder = Path(name)
        say(f"writing {sizes['synthetic']:,} and {sizes['private']:,} embeddings")
        write_data(folder, sizes)
        seconds, peak = measured(command(folder, sizes))
        report = json.loads((folder / "out" / "resampling_report.json").read_text())
    return {
        "sizes": sizes,
        "seconds": seconds,
        "peak_bytes": peak,
        "principal_components": report["clusters"]["principal_components"],
        "total_variation": report["total_variation_to_private"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions_of(VERSIONED),
    }


def write_data(folder: Path, sizes: dict) -> None:
    """Embeddings and texts under `folder`, as the commands before resample leave them."""
    random = np.random.default_rng(0)
    dimensions = sizes["dimensions"]
    spectrum = np.arange(1, dimensions + 1) ** -SPECTRUM
    centres = random.normal(size=(NUM_CENTRES, dimensions)) * spectrum
    texts = [f"instruction {number}: " + "word " * 50 for number in range(sizes["synthetic"])]
    with open(folder / "instructions.jsonl", "w") as file:
        file.writelines(json.dumps({"instruction": text}) + "\n" for text in texts)
    for kind in ("synthetic", "private"):
        weights = random.permutation(1 / np.arange(1, NUM_CENTRES + 1))
        write_embeddings(
            folder / kind,
            scattered(centres, weights / weights.sum(), spectrum, sizes[kind], random),
            (sizes[kind], dimensions),
            texts if kind == "synthetic" else [],
            private=kind == "private",
        )


def scattered(
    centres: np.ndarray,
    probabilities: np.ndarray,
    spectrum: np.ndarray,
    count: int,
    random: np.random.Generator,
) -> Iterable[np.ndarray]:
    """Yield blocks of `count` unit vectors around centres that are drawn by their probabilities."""
    for start in range(0, count, BLOCK_ROWS):
        shape = (min(BLOCK_ROWS, count - start), len(spectrum))
        drawn = random.choice(len(centres), shape[0], p=probabilities)
        noise = random.standard_normal(shape, dtype=np.float32)
        block = centres[drawn] + SCATTER * noise * spectrum
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def write_embeddings(
    folder: Path,
    blocks: Iterable[np.ndarray],
    shape: tuple[int, int],
    texts: list[str],
    *,
    private: bool,
) -> None:
    """Write a finished folder of embeddings, as `embed` leaves it.

    Args:
        blocks: unit vectors in order; `shape` in all.
        texts: those that the vectors stand for; may be empty where nothing reads them.
    """
    place = location(folder, private)
    manifest = {
        "texts_sha256": texts_digest(texts),
        "model_fingerprint": "random",
        "model": "random vectors",
        "num_texts": shape[0],
        "dimensions": shape[1],
        "num_embedded": shape[0],
    }
    begin(place, private, manifest)
    vectors = np.lib.format.open_memmap(
        place / VECTORS_FILE, mode="w+", dtype=np.float16, shape=shape
    )
    start = 0
    for block in blocks:
        vectors[start : start + len(block)] = block
        start += len(block)
    vectors.flush()


def command(folder: Path, sizes: dict) -> list[str]:
    """The resample command on what `write_data` wrote."""
    return [
        sys.executable, "-m", "resample_with_dp_histogram.resample",
        "--private_embeddings", str(folder / "private"),
        "--synthetic_embeddings", str(folder / "synthetic"),
        "--synthetic_instructions", str(folder / "instructions.jsonl"),
        "--output", str(folder / "out"), "--num_bins", str(sizes["bins"]),
    ]  # fmt: skip


def measured(arguments: list[str]) -> tuple[float, int]:
    """Run a command; its seconds and its peak resident set in bytes.

    Raises:
        SystemExit: it failed; its own lines say why.
    """
    began = time.monotonic()
    process = subprocess.Popen(arguments)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(EXIT_FAILED)
    return seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    run_cli(main)
