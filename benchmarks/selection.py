"""Does resampling bring a skewed synthetic pool nearer to the private texts? Real text, real noise.

    python -m benchmarks.selection --texts FILE --work_dir selection --json selection.json

For every seed the texts are parted into rows that play the private data (40%), rows that the pool
is drawn from (50%) and private rows held out (10%), with no text in two parts. The pool is skewed
on purpose: its texts fall into topics (k-means), and a topic keeps a share of its texts that is
log-normal. Where the private part has fewer rows than --num_private, that many are drawn from it
with replacement: each counts as one row, so the noise is what it is at that N. The resample
command then selects from the pool, by the default and the conditional rule, with its own noise
from the operating system's entropy.

Pool, selection and, as a bound, private rows that were not held out are compared with the held-out
rows, in equal numbers: MAUVE, and the total variation between histograms over clusters of all
texts that the selection does not use. Topics, bins and both scores have clusters of their own.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.resampling import write_embeddings
from evaluation.measures.intervals import plus_minus
from evaluation.measures.mauve import mauve
from resample_with_dp_histogram import embed, resample
from resample_with_dp_histogram.clusters import fit_clusters
from resample_with_dp_histogram.embeddings import open_embeddings
from resample_with_dp_histogram.extract import distinct_instructions
from resample_with_dp_histogram.selection import total_variation
from utils.cli import UsageError, run_cli
from utils.command_line.parser import make_parser, positive_float, positive_int
from utils.files import read_jsonl, write_json
from utils.folders import whole_folder
from utils.texts.text_inputs import FORMATS, read_entries
from utils.versions import versions_of

HELD_OUT, PRIVATE = 0.1, 0.4
SELECTED_SHARE = 0.3
NUM_TOPICS, NUM_SCORE_CLUSTERS = 30, 50
SETS = ("pool", "histogram", "histogram_conditional", "private")
SCORES = {"mauve": "MAUVE (1: alike)", "total_variation": "total variation (0: alike)"}
# Flags that say where things are on this machine, and not how the figures came about.
LOCAL = ("json", "work_dir", "texts")
VERSIONED = ("numpy", "faiss-cpu", "sentence-transformers", "torch")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--texts", required=True, metavar="PATH", help=f"instructions: {FORMATS}")
    add("--split", help="the split to read where --texts is a saved DatasetDict")
    add("--work_dir", required=True, type=Path, metavar="DIR", help="embeddings stay here")
    add("--model", default=embed.DEFAULT_MODEL, help="a sentence-transformers hub id or folder")
    add("--num_private", type=positive_int, default=20_000, help="N")
    add("--histogram_sigma", type=positive_float, default=10.0, help="noise of every count")
    add("--num_bins", type=positive_int, default=100, help="clusters, the histogram's bins")
    add("--skew", type=positive_float, default=1.5, help="deviation of the log of a topic's share")
    add("--num_seeds", type=positive_int, default=5, help="trials, each with parts of its own")
    add("--json", type=Path, default=None, metavar="FILE", help="also write this")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    kept, _ = distinct_instructions(read_entries(args.texts, args.split))
    texts = list(kept.values())
    if len(texts) < 100:
        raise UsageError(f"--texts {args.texts!r} has {len(texts)} distinct texts; 100 are needed")
    vectors = embedded(texts, args)
    trials = [
        trial(texts, vectors, seed, args)
        for seed in tqdm(range(args.num_seeds), desc="trial", unit="seed")
    ]
    print(table(trials))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in LOCAL}
        versions = versions_of(VERSIONED)
        write_json(args.json, {"settings": settings, "trials": trials, "versions": versions})


def embedded(texts: list[str], args: argparse.Namespace) -> np.ndarray:
    """Unit vectors of the texts, from --work_dir if they are there."""
    file = args.work_dir / "texts.json"
    write_json(file, texts)
    folder = args.work_dir / "embeddings"
    embed.main(
        ["--synthetic", f"--instructions={file}", f"--output={folder}", f"--model={args.model}"]
    )
    return np.array(open_embeddings(folder, private=False).vectors)


def trial(texts: list[str], vectors: np.ndarray, seed: int, args: argparse.Namespace) -> dict:
    """Sizes, and the scores of each of SETS, for the parts of one seed."""
    random = np.random.default_rng(seed)
    rows = random.permutation(len(texts))
    ends = np.cumsum([int(HELD_OUT * len(rows)), int(PRIVATE * len(rows))])
    held_out, private, candidates = np.split(rows, ends)
    pool = skewed(vectors, candidates, args.skew, seed, random)
    size = min(len(held_out), int(SELECTED_SHARE * len(pool)))
    sets = {"pool": random.choice(pool, size, replace=False)}
    sets["private"] = random.choice(private, size, replace=False)
    replace = len(private) < args.num_private
    counted = random.choice(private, args.num_private, replace=replace)
    for rule in (resample.HISTOGRAM, resample.CONDITIONAL):
        sets[rule] = selected(texts, vectors, pool, counted, rule, size, seed, args)
    reference = held_out[:size]
    clusters = fit_clusters(vectors, min(NUM_SCORE_CLUSTERS, size), seed + 1, "texts")
    bins = clusters.assign(vectors, "texts")

    def histogram(members: np.ndarray) -> np.ndarray:
        return np.bincount(bins[members], minlength=len(clusters.offsets))

    return {
        "seed": seed,
        "sizes": {"private": len(private), "pool": len(pool), "compared": size},
        "scores": {
            name: {
                "mauve": mauve(vectors[sets[name]], vectors[reference], seed),
                "total_variation": total_variation(histogram(sets[name]), histogram(reference)),
            }
            for name in SETS
        },
    }


def skewed(
    vectors: np.ndarray, rows: np.ndarray, skew: float, seed: int, random: np.random.Generator
) -> np.ndarray:
    """The rows that a generator with favourite topics would give."""
    topics = fit_clusters(vectors[rows], NUM_TOPICS, seed + 2, "texts").assign(vectors[rows], "")
    shares = np.exp(skew * random.normal(size=NUM_TOPICS))
    return rows[random.random(len(rows)) < np.minimum(1, shares / np.median(shares))[topics]]


def selected(
    texts: list[str],
    vectors: np.ndarray,
    pool: np.ndarray,
    private: np.ndarray,
    rule: str,
    size: int,
    seed: int,
    args: argparse.Namespace,
) -> np.ndarray:
    """Rows of the pool that the resample command selects."""
    pool_texts = [texts[row] for row in pool]
    with whole_folder(args.work_dir / "trial") as folder:
        write_json(folder / "pool.json", pool_texts)
        for name, members, own in (("synthetic", pool, pool_texts), ("private", private, [])):
            shape = (len(members), vectors.shape[1])
            write_embeddings(
                folder / name, [vectors[members]], shape, own, private=name == "private"
            )
        resample.main([
            f"--private_embeddings={folder / 'private'}",
            f"--synthetic_embeddings={folder / 'synthetic'}",
            f"--synthetic_instructions={folder / 'pool.json'}", f"--output={folder / 'out'}",
            f"--num_bins={args.num_bins}", f"--histogram_sigma={args.histogram_sigma}",
            f"--num_samples={size}", f"--select={rule}", f"--seed={seed}",
        ])  # fmt: skip
        return pool[[row["row"] for row in read_jsonl(folder / "out" / "selected.jsonl")]]


def table(trials: list[dict]) -> str:
    """Mean and standard deviation over the trials, a line a set."""
    lines = [f"{'':<24}" + "".join(f"{title:<28}" for title in SCORES.values())]
    for name in SETS:
        values = [[t["scores"][name][score] for t in trials] for score in SCORES]
        cells = map(plus_minus, values)
        lines.append(f"{name:<24}" + "".join(f"{cell:<28}" for cell in cells))
    sizes = trials[0]["sizes"]
    lines.append(
        f"pool {sizes['pool']:,} rows, compared {sizes['compared']:,}; {len(trials)} seeds"
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run_cli(main)
