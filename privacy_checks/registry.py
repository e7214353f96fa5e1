"""What else was done with the private data of some runs, looked for where runs and histograms lie.

Data sets are known again by fingerprints under `private/`, which never leave it: of a run's rows
and tokens, and of the texts that were embedded. So what was copied without its `private/` is not
found, nor what read another part of the data, or the same rows in another order.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from privacy_checks.composition import composed_report, why_no_guarantee
from topics.folder import HISTOGRAM_FILE, LEDGER_FOLDER
from utils.cli import UsageError
from utils.files import read_jsonl
from utils.privacy.guarantee import rounded_up
from utils.privacy.ledger import HISTOGRAM_LEDGER_FILE, LEDGER_FILE
from utils.runs.run_folder import holds_run

# Where the documentation's commands write, and the pipeline's script in a project's folder; the
# folders that hold the given runs are searched, too.
OUTPUT_FOLDERS = ("outputs", "resampling", "embeddings", "data")
PROJECTS = "projects"
# In which `resample` and `topics.histogram` name the ledger that their histogram is in.
RECORDS = ("resampling_report.json", HISTOGRAM_FILE)
# Of what is in a private/ folder, the fingerprints of its data set, by file.
FINGERPRINTS = {
    "identity.json": ("training_data", "rows_fingerprint"),
    "manifest.json": ("texts_sha256",),
}


def with_left_out(
    report: dict, runs: Sequence[Path], histograms: Sequence[Path], relations: Sequence[str]
) -> dict:
    """A composed report that names what it leaves out of what read the same private data.

    Args:
        report: of `composed_report`, with a guarantee.
        runs, histograms, relations: what it was made of.

    Returns:
        The report itself if nothing is left out; else with a sentence among what is not covered,
        and with "left_out", the folders of runs and ledgers of histograms that were found,
        "epsilon_with_left_out" by relation, None where it is not known, and
        "without_guarantee", the folders of runs that no epsilon is for.
    """
    if unprotected := without_guarantee(runs, histograms):
        report = report | {
            "without_guarantee": [str(path) for path in unprotected],
            "not_covered": [*report["not_covered"], *map(unprotected_by, unprotected)],
        }
    other_runs, other_histograms = left_out(runs, histograms)
    names = [str(path) for path in (*other_runs, *other_histograms)]
    if not names:
        return report
    found = {chain for path in other_histograms for chain in _chains(path)}
    given = [path for path in histograms if not found.issuperset(_chains(path))]
    every_run, every_histogram = [*runs, *other_runs], [*given, *other_histograms]
    try:
        for path in other_histograms:
            if path.name in RECORDS:
                raise UsageError(f"{path} is in no ledger that is here; restore it from a backup")
        together = composed_report(every_run, every_histogram, report["delta"], relations=relations)
        epsilon, unknown = together.get("epsilon"), together.get("why")
    except UsageError as error:
        epsilon, unknown = None, str(error)
    cost = f"what all of it spent together is not known: {unknown}"
    if epsilon is not None:
        upper = {name: rounded_up(epsilon[name]["upper"]) for name in relations}
        bounds = " and ".join(f"{bound} ({name})" for name, bound in upper.items())
        cost = f"with it epsilon is {bounds} at delta {report['delta']:g}"
    sentence = f"{', '.join(names)}: of the same private data, and left out here; {cost}"
    return report | {
        "left_out": names,
        "epsilon_with_left_out": epsilon,
        "not_covered": [*report["not_covered"], sentence],
    }


def unprotected_by(run: Path) -> str:
    """What a reader must know of a run without a guarantee on the same private data."""
    return (
        f"{run} was trained on the same private data without a guarantee "
        f"({why_no_guarantee(run)}): nothing here holds for its model, or for what was made with it"
    )


def without_guarantee(runs: Sequence[Path], histograms: Sequence[Path]) -> list[Path]:
    """Folders of other runs of the data of the given ones that learnt from it without a guarantee.

    One that has neither an adapter nor a checkpoint has learnt nothing.
    """
    given = {run.resolve() for run in runs}
    return [
        folder
        for folder in _of_the_same_data(runs, histograms)
        if holds_run(folder) and folder.resolve() not in given and why_no_guarantee(folder)
        if (folder / "adapter").exists() or [*folder.glob("checkpoints/step-*")]
    ]


def left_out(runs: Sequence[Path], histograms: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders of other DP runs, and other ledgers of histograms, of the data of the given ones.

    A copy of a known run or ledger, or one that holds nothing more, is not another one. A histogram
    that is in no ledger that was found stands for it with its own record: one was removed.
    """
    known_runs = {chain for run in runs for chain in _chains(run / LEDGER_FILE)[:1]}
    known_histograms = {chain for path in histograms for chain in _chains(path)}
    found: tuple[list[Path], list[Path]] = ([], [])
    same = [*_of_the_same_data(runs, histograms)]
    for folder in same:
        # The first line of a run's ledger is its plan alone.
        if (chains := _chains(folder / LEDGER_FILE))[1:] and not known_runs.issuperset(chains[:1]):
            known_runs.add(chains[0])
            if not why_no_guarantee(folder):
                found[0].append(folder)
        for histogram in _histogram_ledgers(folder):
            if not known_histograms.issuperset(chains := _chains(histogram)):
                found[1].append(histogram)
                known_histograms.update(chains)
    for folder in same:
        for record, ledger in _records(folder):
            if ledger["chain"] not in {"", *known_histograms}:
                found[1].append(record)
    return found


def _of_the_same_data(runs: Sequence[Path], histograms: Sequence[Path]) -> Iterator[Path]:
    """Folders of runs and embeddings that share a fingerprint with the given ones; these too."""
    given = [*runs, *(path.parent for path in histograms)]
    sought = {fingerprint for folder in given for fingerprint in _fingerprints(folder)}
    for folder in _folders_with_private(runs):
        if not sought.isdisjoint(_fingerprints(folder)):
            yield folder


def _histogram_ledgers(folder: Path) -> Iterator[Path]:
    """Where a folder's histogram may be on record: in it, or where its own record says.

    A place is as the command was given it, from the folder where it ran.
    """
    yield folder / HISTOGRAM_LEDGER_FILE
    yield folder / LEDGER_FOLDER / HISTOGRAM_LEDGER_FILE
    for _, ledger in _records(folder):
        yield Path(ledger["path"])


def _records(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """What a folder's histogram says of itself: the file, and the path and chain of its ledger."""
    for name in RECORDS:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((folder / name).read_text())["ledger"]
            yield folder / name, {each: str(known.get(each, "")) for each in ("path", "chain")}


def _folders_with_private(runs: Sequence[Path]) -> Iterator[Path]:
    """Folders that have a `private/`, next to the given runs and below `OUTPUT_FOLDERS`.

    Of this folder, of the project that a run is in, and of every project next to that one or here.
    """
    places = [run.resolve().parent if run.name == "" else run.parent for run in runs]
    projects = [place.resolve().parent for place in places if place.name in OUTPUT_FOLDERS]
    for folder in {Path(PROJECTS), *(each.parent for each in projects if _is_project(each))}:
        projects += sorted(filter(_is_project, folder.glob("*")))
    seen = set()
    below = [folder / name for folder in (Path(), *projects) for name in OUTPUT_FOLDERS]
    for place in (*places, *below):
        for private in sorted([*place.glob("*/private"), *place.glob("*/*/private")]):
            if private.resolve() not in seen:
                seen.add(private.resolve())
                yield private.parent


def _is_project(folder: Path) -> bool:
    """Whether the pipeline's script wrote to a folder."""
    return (folder / "stages").is_dir()


def _fingerprints(folder: Path) -> Iterable[str]:
    """What is known of the private data behind a folder; nothing where it cannot be read."""
    for name, facts in FINGERPRINTS.items():
        try:
            known = json.loads((folder / "private" / name).read_text())
        except (OSError, ValueError):
            continue
        yield from (known[fact] for fact in facts if fact in known)


def _chains(ledger: Path) -> list[str]:
    """The chain values of a ledger's lines, which tell it from others; none where there is none."""
    if not ledger.is_file() or ledger.name in RECORDS:
        return []
    return [record.get("chain", "") for record in read_jsonl(ledger)]
