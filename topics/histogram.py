"""How many private rows each topic has, with noise: a DP histogram to sample by.

    python -m topics.histogram --assigned data/mine_topics --output resampling/topic_histogram

Counts the topics of the train split and adds Gaussian noise to every count: one Gaussian mechanism
of noise multiplier --histogram_sigma for adding or removing one row, or with the --unit_column of
assign one unit with all of its rows, each of which counts 1 over their number. It is written to a
ledger before its noise is drawn, and composes with training, which plans for it by
--reserve_histogram_sigma:

    python -m privacy_checks.report outputs/mine --histogram LEDGER

Topics whose noisy count is not above the noise are left out. Writes to OUTPUT, all of which but
private/ may be released if its report says so: topic_histogram.json, which sampling takes with
--topic_histogram.
"""

from dataclasses import dataclass
from pathlib import Path

from resample_with_dp_histogram.release import HistogramSettings
from utils.command_line.parser import answer_early, command_line, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings(HistogramSettings):
    """The flags of the histogram of topics."""

    assigned: Path = flag(
        "the --output of assign; its train split is counted", required=True, type=Path,
        metavar="DATASET",
    )  # fmt: skip
    output: Path = flag("folder, which must not exist", required=True, type=Path, metavar="DIR")
    least_sigmas: float = flag(
        "topics with a noisy count of fewer deviations of the noise are left out", 2.0
    )


answer_early(__name__, Settings, __doc__)

import numpy as np

from resample_with_dp_histogram.embeddings import PRIVATE_FOLDER, write_identity
from resample_with_dp_histogram.release import prepare_release, say_spent
from topics.folder import HISTOGRAM_FILE, LEDGER_FOLDER, read_assignment
from utils.cli import run_cli, say
from utils.files import write_json
from utils.folders import claimed, private_folder, require_new, whole_folder

COVERED = [
    "the noisy counts of topics, and whatever is computed from them and from what else is covered: "
    "which topics are left out, the prompts, the samples",
    "the topics: they never see private rows",
]
NOT_COVERED = [
    "the topic of a single row, which is a part of the row, under the data set that assign wrote",
    "that assign came to an end: it refuses rows that cannot be embedded, and whether there are "
    "such depends on private data",
    "the choice of sigma, of topics or of the threshold after a look at several histograms that "
    "are not all in the ledger",
]


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    # From the first check on: one that found another in its place would have paid for nothing.
    with claimed(settings.output):
        count(settings)


def count(settings: Settings) -> None:
    """Count with noise, leave out what the noise hides, and write."""
    output = settings.output
    require_new(output)
    assigned = read_assignment(settings.assigned)
    known = assigned.record
    release = prepare_release(
        settings,
        settings.assigned / LEDGER_FOLDER,
        assigned.num_examples,
        known["unit_column"],
        known["owner"],
    )
    num_topics = len(known["keywords"])
    noisy, ledger = release.draw(assigned.topics, num_topics, assigned.units)
    # From here on everything is post-processing.
    least = settings.least_sigmas * settings.histogram_sigma
    kept, left_out = above_noise(known["keywords"], noisy, least)
    report = release.facts(num_topics, ledger, COVERED, NOT_COVERED)
    own = command_line("topics.histogram", Settings, settings)
    report |= {
        "least_count": least,
        "fitted_on": known["fitted_on"],
        "commands": [*known["commands"], own],
    }
    with whole_folder(output) as folder:
        write_json(folder / HISTOGRAM_FILE, {"topics": kept, "left_out": left_out, **report})
        write_identity(private_folder(folder / PRIVATE_FOLDER), known["rows_fingerprint"])
    say_topics(kept, left_out, least)
    say(f"the histogram is {output / HISTOGRAM_FILE}")
    say_spent(report)


def above_noise(
    keywords: list[str], counts: np.ndarray, least: float
) -> tuple[list[dict], list[dict]]:
    """Topics to keep, and those that the noise hides, the largest first.

    Args:
        keywords: of each topic.
        counts: float64 [topics], noisy.
        least: of a count that is kept, which is above 0 as well.

    Returns:
        For each topic its number, keywords and noisy count.
    """
    found: tuple[list[dict], list[dict]] = ([], [])
    for topic in np.argsort(-counts, kind="stable").tolist():
        value = float(counts[topic])
        entry = {"topic": topic, "keywords": keywords[topic], "count": value}
        found[not 0 < value >= least].append(entry)
    return found


def say_topics(kept: list[dict], left_out: list[dict], least: float) -> None:
    """Tell which topics are kept and which are left out."""
    for each in kept:
        say(f"{each['count']:>12,.1f}  {each['keywords']}")
    if left_out:
        names = "; ".join(f"{each['keywords']} ({each['count']:.1f})" for each in left_out)
        say(
            f"{len(left_out)} of {len(kept) + len(left_out)} topics left out, since their noisy "
            f"count is below {least:g}: {names}"
        )
    if not kept:
        say(
            "no topic is above the noise, so nothing can be sampled by this histogram; use fewer "
            "topics, or less noise"
        )


if __name__ == "__main__":
    run_cli(main)
