"""Time and memory of resampling at the size of the paper.

    python -m benchmarks.resampling --json resampling.json
    python -m benchmarks.resampling --quick

Writes random embeddings to a temporary folder and runs the resample command on them: 1,000,000
synthetic and 180,000 private vectors of 768 dimensions, 1,000 clusters. Peak memory is the
command's resident set, mapped files included. Exit code 1 if it takes more than 30 minutes or
6 GiB. Needs 3 GB of disk.
"""

from dataclasses import dataclass

from benchmarks import figures
from utils.command_line.parser import answer_early, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags."""

    quick: bool = flag("a tiny size, to try the benchmark", False)


answer_early(__name__, Settings, __doc__)

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import figures
from resample_with_dp_histogram.embed import begin, make_vectors
from resample_with_dp_histogram.embeddings import location
from utils.cli import EXIT_FAILED, EXIT_OK, run_cli, say
from utils.texts.data_sets import rows_fingerprint
from utils.versions import versions_of

MAX_SECONDS, MAX_BYTES = 30 * 60, 6 << 30
FULL = {"synthetic": 1_000_000, "private": 180_000, "dimensions": 768, "bins": 1000}
QUICK = {"synthetic": 3000, "private": 900, "dimensions": 32, "bins": 20}
NUM_CENTRES = 2000
BLOCK_ROWS = 20_000
# Length of a vector's own part over that of its centre, and the exponent of the spectrum.
SCATTER, SPECTRUM = 0.7, 0.5
VERSIONED = ("numpy", "faiss-cpu", "torch")


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    results = benchmark(QUICK if settings.quick else FULL)
    sizes, distance = results["sizes"], results["total_variation"]
    seconds, peak = results["seconds"], results["peak_bytes"]
    rows = {
        "synthetic x private": f"{sizes['synthetic']:,} x {sizes['private']:,}",
        "dimensions, kept": f"{sizes['dimensions']}, {results['principal_components']}",
        "clusters": f"{sizes['bins']:,}",
        "cores": f"{results['cores']}",
        "time": f"{seconds:.0f} s (at most {MAX_SECONDS} s)",
        "peak memory": f"{peak / 2**30:.2f} GiB (at most {MAX_BYTES / 2**30:.0f} GiB)",
        "distance, pool": f"{distance['synthetic']:.3f}",
        "distance, selected": f"{distance['selected']:.3f}",
    }
    for label, value in rows.items():
        print(f"{label:<20} {value}")
    settings.write(results)
    return EXIT_OK if seconds <= MAX_SECONDS and peak <= MAX_BYTES else EXIT_FAILED


def benchmark(sizes: dict[str, int]) -> dict:
    """Run the resample command on data of some size; what was measured."""
    with tempfile.TemporaryDirectory(prefix="resampling-") as folder:
        say(f"writing {sizes['synthetic']:,} and {sizes['private']:,} embeddings")
        write_data(Path(folder), sizes)
        seconds, peak = measured([
            sys.executable, "-m", "resample_with_dp_histogram.resample",
            f"--private_embeddings={folder}/private",
            f"--synthetic_embeddings={folder}/synthetic",
            f"--synthetic_instructions={folder}/instructions.jsonl",
            f"--output={folder}/out", f"--num_bins={sizes['bins']}",
        ])  # fmt: skip
        report = json.loads(Path(folder, "out", "resampling_report.json").read_text())
    return {
        "sizes": sizes,
        "seconds": seconds,
        "peak_bytes": peak,
        "principal_components": report["clusters"]["principal_components"],
        "total_variation": report["total_variation_to_private"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions_of(VERSIONED),
    }


def write_data(folder: Path, sizes: dict[str, int]) -> None:
    """Embeddings and texts under `folder`, as the commands before resample leave them.

    Unit vectors around centres whose sizes follow Zipf's law, with a spectrum that falls as that
    of sentence embeddings does; the private ones have other sizes.
    """
    random, dimensions = np.random.default_rng(0), sizes["dimensions"]
    spectrum = np.arange(1, dimensions + 1) ** -SPECTRUM
    centres = random.normal(size=(NUM_CENTRES, dimensions)) * spectrum

    def blocks(count: int, weights: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, count, BLOCK_ROWS):
            shape = (min(BLOCK_ROWS, count - start), dimensions)
            drawn = random.choice(NUM_CENTRES, shape[0], p=weights / weights.sum())
            noise = random.standard_normal(shape, dtype=np.float32)
            block = centres[drawn] + SCATTER * noise * spectrum
            yield block / np.linalg.norm(block, axis=1, keepdims=True)

    texts = [f"instruction {number}: " + "word " * 50 for number in range(sizes["synthetic"])]
    with open(folder / "instructions.jsonl", "w") as file:
        file.writelines(json.dumps({"instruction": text}) + "\n" for text in texts)
    for kind, own in (("synthetic", texts), ("private", [])):
        vectors = blocks(sizes[kind], random.permutation(1 / np.arange(1, NUM_CENTRES + 1)))
        shape = (sizes[kind], dimensions)
        write_embeddings(folder / kind, vectors, shape, own, private=kind == "private")


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
        "texts_sha256": rows_fingerprint(texts),
        "model_fingerprint": "random",
        "model": "random vectors",
        "num_texts": shape[0],
        "dimensions": shape[1],
        "num_embedded": shape[0],
    }
    begin(place, private, manifest)
    vectors = make_vectors(place, shape)
    start = 0
    for block in blocks:
        vectors[start : start + len(block)] = block
        start += len(block)
    vectors.flush()


def measured(arguments: list[str]) -> tuple[float, int]:
    """Run a command; its seconds and its peak resident set in bytes.

    Raises:
        SystemExit: it failed; its own lines say why.
    """
    began = time.monotonic()
    process = os.posix_spawnp(arguments[0], arguments, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(EXIT_FAILED)
    return time.monotonic() - began, usage.ru_maxrss * 1024


if __name__ == "__main__":
    run_cli(main)
