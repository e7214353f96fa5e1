"""Select synthetic instructions whose distribution follows the private one, through a DP histogram.

    python -m resample_with_dp_histogram.resample --private_embeddings embeddings/chatbot_arena \\
        --synthetic_embeddings embeddings/mine \\
        --synthetic_instructions synthetic/mine/instructions.jsonl --output selected/mine

Clusters the synthetic embeddings (unit length, PCA to 90% of the variance, k-means), counts the
private ones in these clusters, adds Gaussian noise to every count, and samples synthetic rows by
the noisy histogram. Private data is read for the counts alone: clusters are fitted on synthetic
embeddings only. Adding or removing one private row moves one count by 1, so the histogram is one
Gaussian mechanism of noise multiplier --histogram_sigma. With --unit_column it is one for a unit,
such as a person, with all of its rows: each of its k rows counts 1/k. The histogram is written to a
ledger before its noise is drawn, and composes with training:

    python -m privacy_checks.report outputs/mine --histogram LEDGER

The number N of private rows (of units with --unit_column) is a public constant, as it is in
training, and the default size of the selection. Writes to OUTPUT, all of which but private/ may be
released if its report says so: selected.jsonl (row is a text's number in the pool from 0; sample_id
and shard are the sample that it was, if the pool says), histograms.json and .png, clusters.npz,
resampling_report.json. In private/ is the fingerprint of the private rows.
"""

from dataclasses import dataclass
from pathlib import Path

from resample_with_dp_histogram.release import HistogramSettings
from utils.command_line.parser import (
    answer_early,
    command_line,
    flag,
    natural_int,
    positive_int,
    read_flags,
)
from utils.texts.text_inputs import FORMATS, Origin, files_of, origins, read_instructions

HISTOGRAM, CONDITIONAL = "histogram", "histogram_conditional"


@dataclass(frozen=True, kw_only=True)
class Settings(HistogramSettings):
    """The flags of `resample`."""

    private_embeddings: Path = flag(
        "the --output of embed --private", required=True, type=Path, metavar="DIR"
    )
    synthetic_embeddings: Path = flag(
        "the --output of embed --synthetic", required=True, type=Path, metavar="DIR"
    )
    synthetic_instructions: str = flag(
        f"the texts that --synthetic_embeddings are of: {FORMATS}", required=True, metavar="PATH"
    )
    split: str | None = flag(
        "the split to read where --synthetic_instructions is a saved DatasetDict"
    )
    output: Path = flag("folder, which must not exist", required=True, type=Path, metavar="DIR")
    num_bins: int = flag("clusters, the histogram's bins", 1000)
    num_samples: int | None = flag(
        "synthetic rows to select; N, which is public, if left out", type=positive_int
    )
    select: str = flag(
        "histogram: as many rows of each bin as the histogram says, none twice; "
        "histogram_conditional: draw each row's bin from the histogram, and repeat rows of scarce "
        "bins up to --max_copies times, so that more can be selected than the pool's shape allows",
        HISTOGRAM,
        choices=(HISTOGRAM, CONDITIONAL),
    )
    max_copies: int = flag("times that histogram_conditional may select one row", 4)
    seed: int = flag(
        "clusters, and which rows of a bin are selected; never the noise", 0, type=natural_int
    )

    unit_column: str | None = flag(
        "the --unit_column of embed --private, needed if it had one: each row then counts 1 over "
        "the rows of its unit, so that sigma is for all rows of one unit, and N counts units",
        group="privacy",
    )


answer_early(__name__, Settings, __doc__)

import io
import itertools
import json

import numpy as np

from resample_with_dp_histogram.clusters import PCA_VARIANCE, Clusters, fit_clusters
from resample_with_dp_histogram.embeddings import (
    PRIVATE_FOLDER,
    Embeddings,
    open_embeddings,
    require_same_model,
    write_identity,
)
from resample_with_dp_histogram.extract import SELECTED_FILE
from resample_with_dp_histogram.histogram import project_to_simplex
from resample_with_dp_histogram.release import prepare_release, say_spent
from resample_with_dp_histogram.selection import (
    Allocation,
    allocate,
    choose_rows,
    largest_remainders,
    total_variation,
)
from utils.cli import UsageError, run_cli, say
from utils.files import hashes_of, sha256_of, write_json
from utils.folders import claimed, private_folder, require_new, whole_folder
from utils.progress import Progress
from utils.texts.data_sets import rows_fingerprint

COVERED = [
    "the noisy histogram, and whatever is computed from it and from synthetic texts alone: the "
    "selection, its order, the distances and the plot",
    "the clusters and the bins of synthetic rows: they never see private data",
]
NOT_COVERED = [
    "the private embeddings, under private/ of their folder",
    "that this run came to an end: it refuses private vectors that are damaged (not finite, not "
    "of unit length), and whether they are depends on private data",
    "the choice of sigma, bins or size after a look at several histograms that are not all in the "
    "ledger",
    "rounding in the embedding model: which texts share a batch decides the last bits of an "
    "embedding, and a text that lies between two bins may change its bin with them",
]


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    # From the first check on: one that found another in its place would have paid for nothing.
    with claimed(settings.output):
        select(settings)


def select(settings: Settings) -> None:
    """The selection: clusters, the DP histogram, rows."""
    # ------------------------------------------------------------------ what is asked for
    output, num_bins = settings.output, settings.num_bins
    require_new(output)
    private = open_embeddings(settings.private_embeddings, private=True)
    synthetic = open_embeddings(settings.synthetic_embeddings, private=False)
    require_same_model(private, synthetic)
    check_unit(settings.unit_column, private)
    texts = read_instructions(settings.synthetic_instructions, settings.split)
    check_texts(settings.synthetic_instructions, texts, synthetic)
    samples = origins(settings.synthetic_instructions, settings.split, cut=False)
    owner = private.manifest.get("owner")
    release = prepare_release(
        settings, settings.private_embeddings, private.num_examples, settings.unit_column, owner
    )
    num_samples = settings.num_samples or release.num_examples
    copies = settings.max_copies if settings.select == CONDITIONAL else 1
    check_size(num_samples, len(texts), copies)

    # ------------------------------------------------------------------ clusters and counts
    steps = Progress(None, "cluster", unit="step", total=3)
    clusters = fit_clusters(synthetic.vectors, num_bins, settings.seed, str(synthetic.folder))
    steps.update()
    synthetic_bins = clusters.assign(synthetic.vectors, str(synthetic.folder))
    pool = np.bincount(synthetic_bins, minlength=num_bins)
    steps.update()
    private_bins = clusters.assign(private.vectors, str(private.folder))
    steps.update()
    steps.close()

    # ------------------------------------------------------------------ the DP histogram
    noisy, ledger = release.draw(private_bins, num_bins, private.units)
    del private_bins
    # From here on everything is post-processing.
    target = project_to_simplex(noisy, release.num_examples)

    # ------------------------------------------------------------------ the selection
    choice = np.random.default_rng(settings.seed)
    share = largest_remainders
    if settings.select == CONDITIONAL:

        def share(probabilities: np.ndarray, size: int) -> np.ndarray:
            return choice.multinomial(size, probabilities)

    allocation = allocate(target, copies * pool, num_samples, share)
    rows = choose_rows(synthetic_bins, allocation.counts, choice)
    histograms = {
        "private_noisy": noisy,
        "private": target,
        "synthetic": pool,
        "selected": allocation.counts,
    }
    report = release.facts(num_bins, ledger, COVERED, NOT_COVERED)
    report |= facts_of_selection(settings, clusters, histograms, allocation, rows)
    with whole_folder(output) as folder:
        write_selection(folder / SELECTED_FILE, texts, samples, synthetic_bins, rows)
        lists = {name: values.tolist() for name, values in histograms.items()}
        write_json(folder / "histograms.json", lists)
        (folder / "histograms.png").write_bytes(plot(histograms, settings.histogram_sigma))
        np.savez(
            folder / "clusters.npz",
            weights=clusters.weights,
            offsets=clusters.offsets,
            synthetic_bins=synthetic_bins,
        )
        embedded = [each.manifest.get("commands", []) for each in (synthetic, private)]
        own = command_line("resample_with_dp_histogram.resample", Settings, settings)
        report |= {
            "commands": [*itertools.chain(*embedded), own],
            "inputs_sha256": hashes_of(files_of(settings.synthetic_instructions, settings.split)),
            "outputs_sha256": {SELECTED_FILE: sha256_of(folder / SELECTED_FILE)},
        }
        write_json(folder / "resampling_report.json", report)
        hidden = private_folder(folder / PRIVATE_FOLDER)
        write_identity(hidden, private.manifest["texts_sha256"])
    say_end(output, report)


def check_unit(unit_column: str | None, private: Embeddings) -> None:
    """Refuse another unit than that of the embeddings, be it none.

    A forgotten flag is refused, though the units are known: N, the ledger and what the report may
    claim depend on it, and a wrong one would show only after the histogram is spent.
    """
    theirs = private.manifest.get("unit_column")
    if unit_column == theirs:
        return
    if theirs is None:
        raise UsageError(
            f"--unit_column {unit_column}: {private.folder} was embedded without it; embed the "
            f"texts with --unit_column {unit_column} to another folder"
        )
    given = "no --unit_column" if unit_column is None else f"--unit_column {unit_column}"
    raise UsageError(
        f"{given}: the rows of {private.folder} belong to units of {theirs!r}; give --unit_column "
        f"{theirs}, or embed the texts in another way to another folder"
    )


def check_texts(path: str, texts: list[str], synthetic: Embeddings) -> None:
    """Refuse texts that are not those of the embeddings."""
    if len(texts) != len(synthetic.vectors):
        raise UsageError(
            f"{path} holds {len(texts):,} instructions and {synthetic.folder} "
            f"{len(synthetic.vectors):,} embeddings; name the file that was embedded"
        )
    if rows_fingerprint(texts) != synthetic.manifest["texts_sha256"]:
        raise UsageError(
            f"{synthetic.folder} holds embeddings of other texts than {path}; name the file that "
            "was embedded, or embed this one"
        )


def check_size(num_samples: int, pool_size: int, copies: int) -> None:
    """Refuse to select more than the pool can give."""
    if num_samples > copies * pool_size:
        times = f", each at most {copies} times" if copies > 1 else ""
        raise UsageError(
            f"{num_samples:,} rows cannot be selected out of {pool_size:,}{times}; sample more, "
            f"lower --num_samples, or use --select {CONDITIONAL} and a higher --max_copies"
        )


def facts_of_selection(
    settings: Settings,
    clusters: Clusters,
    histograms: dict[str, np.ndarray],
    allocation: Allocation,
    rows: np.ndarray,
) -> dict:
    """What was done with the histogram: a JSON-able dict."""
    return {
        "clusters": {
            "fitted_on": "synthetic embeddings only",
            "pca_variance": PCA_VARIANCE,
            "principal_components": clusters.num_components,
        },
        "selection": {
            "select": settings.select,
            "seed": settings.seed,
            "num_samples": len(rows),
            "distinct_rows": len(np.unique(rows)),
            "pool": int(histograms["synthetic"].sum()),
            "overflow": allocation.overflow,
            "from_empty_bins": allocation.from_empty_bins,
        },
        "total_variation_to_private": {
            name: total_variation(histograms[name], histograms["private"])
            for name in ("synthetic", "selected")
        },
    }


def write_selection(
    path: Path, texts: list[str], samples: list[Origin], bins: np.ndarray, rows: np.ndarray
) -> None:
    """One object a line: the row's number in the pool, the sample it was, its text and its bin."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows.tolist():
            record = {
                "row": row,
                **samples[row]._asdict(),
                "instruction": texts[row],
                "bin": int(bins[row]),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def plot(histograms: dict[str, np.ndarray], sigma: float) -> bytes:
    """A PNG of the three histograms over bins, sorted by the private one."""
    from matplotlib.figure import Figure

    labels = {
        "synthetic": "synthetic pool",
        "selected": "selected",
        "private": f"private, with noise of deviation {sigma:g}",
    }
    order = np.argsort(-histograms["private"], kind="stable")
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, label in labels.items():
        shares = histograms[name] / histograms[name].sum()
        axes.step(np.arange(1, len(order) + 1), shares[order], where="mid", lw=0.9, label=label)
    axes.set_xlabel("bins, the most private rows first")
    axes.set_ylabel("share of rows")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def say_end(output: Path, report: dict) -> None:
    """Tell what was selected and what it costs."""
    selection, distance = report["selection"], report["total_variation_to_private"]
    say(
        f"{selection['num_samples']:,} rows ({selection['distinct_rows']:,} distinct) of "
        f"{selection['pool']:,} are in {output / SELECTED_FILE}"
    )
    if selection["overflow"]:
        say(
            f"{selection['overflow']:,} of them stand in for rows that their bin did not have "
            f"({selection['from_empty_bins']:,} come from bins without private rows)"
        )
    say(
        f"total variation to the noisy private histogram: pool {distance['synthetic']:.3f}, "
        f"selected {distance['selected']:.3f}"
    )
    say_spent(report)


if __name__ == "__main__":
    run_cli(main)
