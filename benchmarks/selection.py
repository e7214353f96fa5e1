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

from dataclasses import dataclass
from pathlib import Path

from benchmarks import figures
from resample_with_dp_histogram.embeddings import DEFAULT_MODEL, open_embeddings
from utils.command_line.parser import answer_early, flag, read_flags
from utils.texts.text_inputs import FORMATS, read_entries


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags."""

    texts: str = flag(f"instructions: {FORMATS}", required=True, metavar="PATH")
    split: str | None = flag("the split to read where --texts is a saved DatasetDict")
    work_dir: Path = flag("embeddings stay here", required=True, type=Path, metavar="DIR")
    model: str = flag("a sentence-transformers hub id or folder", DEFAULT_MODEL)
    num_private: int = flag("N", 20_000)
    histogram_sigma: float = flag("noise of every count", 10.0)
    num_bins: int = flag("clusters, the histogram's bins", 100)
    skew: float = flag("deviation of the log of a topic's share", 1.5)
    num_seeds: int = flag("trials, each with parts of its own", 5)


answer_early(__name__, Settings, __doc__)

import numpy as np

from benchmarks.figures import aligned
from benchmarks.resampling import write_embeddings
from evaluation.measures.intervals import plus_minus
from evaluation.measures.mauve import mauve
from resample_with_dp_histogram import embed, resample
from resample_with_dp_histogram.clusters import fit_clusters
from resample_with_dp_histogram.extract import distinct_instructions
from resample_with_dp_histogram.selection import total_variation
from utils.cli import UsageError, run_cli
from utils.files import read_jsonl, write_json
from utils.folders import whole_folder
from utils.progress import Progress
from utils.versions import versions_of

HELD_OUT, PRIVATE = 0.1, 0.4
SELECTED_SHARE = 0.3
NUM_TOPICS, NUM_SCORE_CLUSTERS = 30, 50
SETS = ("pool", "histogram", "histogram_conditional", "private")
SCORES = {"mauve": "MAUVE (1: alike)", "total_variation": "total variation (0: alike)"}
VERSIONED = ("numpy", "faiss-cpu", "sentence-transformers", "torch")


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    kept, _ = distinct_instructions(read_entries(settings.texts, settings.split))
    texts = list(kept.values())
    if len(texts) < 100:
        raise UsageError(
            f"--texts {settings.texts!r} has {len(texts)} distinct texts; 100 are needed"
        )
    file, folder = settings.work_dir / "texts.json", settings.work_dir / "embeddings"
    write_json(file, texts)
    embed.main([
        "--synthetic", f"--instructions={file}", f"--output={folder}", f"--model={settings.model}"
    ])  # fmt: skip
    vectors = np.array(open_embeddings(folder, private=False).vectors)
    trials = [
        trial(texts, vectors, seed, settings)
        for seed in Progress(range(settings.num_seeds), "trial", unit="seed")
    ]
    print(table(trials))
    versions = versions_of(VERSIONED)
    settings.write({"settings": settings.on_record(), "trials": trials, "versions": versions})


def trial(texts: list[str], vectors: np.ndarray, seed: int, settings: Settings) -> dict:
    """Sizes, and the scores of each of SETS, for the parts of one seed."""
    random = np.random.default_rng(seed)
    rows = random.permutation(len(texts))
    ends = np.cumsum([int(HELD_OUT * len(rows)), int(PRIVATE * len(rows))])
    held_out, private, candidates = np.split(rows, ends)
    pool = skewed(vectors, candidates, settings.skew, seed, random)
    size = min(len(held_out), int(SELECTED_SHARE * len(pool)))
    sets = {"pool": random.choice(pool, size, replace=False)}
    sets["private"] = random.choice(private, size, replace=False)
    replace = len(private) < settings.num_private
    counted = random.choice(private, settings.num_private, replace=replace)
    for rule in (resample.HISTOGRAM, resample.CONDITIONAL):
        sets[rule] = selected(texts, vectors, pool, counted, rule, size, seed, settings)
    reference = held_out[:size]
    clusters = fit_clusters(vectors, min(NUM_SCORE_CLUSTERS, size), seed + 1, "texts")
    bins = clusters.assign(vectors, "texts")

    def scores(members: np.ndarray) -> dict[str, float]:
        one, other = (
            np.bincount(bins[each], minlength=len(clusters.offsets))
            for each in (members, reference)
        )
        return {
            "mauve": mauve(vectors[members], vectors[reference], seed),
            "total_variation": total_variation(one, other),
        }

    return {
        "seed": seed,
        "sizes": {"private": len(private), "pool": len(pool), "compared": size},
        "scores": {name: scores(sets[name]) for name in SETS},
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
    settings: Settings,
) -> np.ndarray:
    """Rows of the pool that the resample command selects."""
    pool_texts = [texts[row] for row in pool]
    with whole_folder(settings.work_dir / "trial") as folder:
        write_json(folder / "pool.json", pool_texts)
        for name, members, own in (("synthetic", pool, pool_texts), ("private", private, [])):
            found = vectors[members]
            write_embeddings(folder / name, [found], found.shape, own, private=name == "private")
        resample.main([
            f"--private_embeddings={folder / 'private'}",
            f"--synthetic_embeddings={folder / 'synthetic'}",
            f"--synthetic_instructions={folder / 'pool.json'}", f"--output={folder / 'out'}",
            f"--num_bins={settings.num_bins}", f"--histogram_sigma={settings.histogram_sigma}",
            f"--num_samples={size}", f"--select={rule}", f"--seed={seed}",
        ])  # fmt: skip
        return pool[[row["row"] for row in read_jsonl(folder / "out" / "selected.jsonl")]]


def table(trials: list[dict]) -> str:
    """Mean and standard deviation over the trials, a line a set."""
    rows = [["", *SCORES.values()]]
    for name in SETS:
        values = [[t["scores"][name][score] for t in trials] for score in SCORES]
        rows.append([name, *map(plus_minus, values)])
    pool, compared = (trials[0]["sizes"][name] for name in ("pool", "compared"))
    return f"{aligned(rows)}\npool {pool:,} rows, compared {compared:,}; {len(trials)} seeds"


if __name__ == "__main__":
    run_cli(main)
