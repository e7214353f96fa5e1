"""What a project's folder holds for a page, found by the files that every stage leaves.

A run without differential privacy counts as one on synthetic data where the record of its data set
says that it was made of the project's annotations, whose instructions a page requires to be
synthetic. Any other counts as one that read private rows, which takes the guarantee away.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from evaluation.page.material import Sources
from evaluation.results import PRIVATE_FOLDER
from query_gpt35_for_annotation.job import answers_file
from resample_with_dp_histogram.extract import INSTRUCTIONS_FILE, SELECTED_FILE
from topics.folder import HISTOGRAM_FILE
from utils.cli import UsageError
from utils.files import json_object
from utils.folders import PREPARATION_FILE
from utils.privacy.ledger import HISTOGRAM_LEDGER_FILE
from utils.runs.run_folder import CONFIG_FILE, holds_run
from utils.sampling.shards import shards_of
from utils.texts.data_sets import find_dataset

AnySources = TypeVar("AnySources", bound=Sources)
# Folders inside one of a stage, in which no other stage is.
WITHIN = (PRIVATE_FOLDER, "checkpoints", "adapter")


def with_project(sources: AnySources, project: Path) -> AnySources:
    """Add what lies below a project's folder to what flags name.

    Raises:
        UsageError: there is no run, or there are two folders of a kind of which a page has one.
    """
    folders = list(_folders(project))

    def one(given: Path | None, name: str, kind: str) -> Path | None:
        found = [folder for folder in folders if (folder / name).is_file()]
        if given is None and len(found) > 1:
            raise UsageError(
                f"--project {project} has {' and '.join(map(str, found))}; name one with {kind}"
            )
        return given or next(iter(found), None)

    def all_of(given: list[Path], found: list[Path]) -> list[Path]:
        known = {path.resolve() for path in given}
        return given + [path for path in found if path.resolve() not in known]

    annotations = one(sources.annotations, answers_file(Path()).name, "--annotations")
    pairs = [] if annotations is None else _data_sets_of(annotations, folders)
    runs = [folder for folder in folders if holds_run(folder)]
    plain = [run for run in runs if _is_on_one_of(pairs, run)]
    synthetic = all_of(sources.synthetic_runs, plain)
    ledgers = [folder / HISTOGRAM_LEDGER_FILE for folder in folders]
    found = replace(
        sources,
        run=[run for run in all_of(sources.run, runs) if run not in synthetic],
        synthetic_runs=synthetic,
        histogram=all_of(sources.histogram, [ledger for ledger in ledgers if ledger.is_file()]),
        samples=all_of(sources.samples, [folder for folder in folders if shards_of(folder)]),
        evaluations=all_of(
            sources.evaluations,
            [folder for folder in folders if _holds_results(folder, sources.internal)],
        ),
        extraction=one(sources.extraction, INSTRUCTIONS_FILE, "--extraction"),
        selection=one(sources.selection, SELECTED_FILE, "--selection"),
        topics=one(sources.topics, HISTOGRAM_FILE, "--topics"),
        annotations=annotations,
    )
    if not found.run:
        raise UsageError(f"--project {project} has no training run on private rows; name a RUN")
    return found


def _folders(project: Path) -> Iterator[Path]:
    """The folders of a project that may be a stage's, in order of their names."""
    for parent, names, _ in os.walk(project):
        names[:] = sorted(name for name in names if name not in WITHIN and name[0] != ".")
        yield Path(parent)


def _data_sets_of(annotations: Path, folders: list[Path]) -> list[Path]:
    """The data sets that were made of a folder of answers."""
    records = {folder: json_object(folder / PREPARATION_FILE) for folder in folders}
    return [
        folder.resolve()
        for folder, record in records.items()
        if "answers" in record and Path(record["answers"]).resolve() == annotations.resolve()
    ]


def _is_on_one_of(data_sets: list[Path], run: Path) -> bool:
    """Whether a run without differential privacy is on one of some data sets.

    Its record names one of another place than the working folder by its last name alone.
    """
    arguments = json_object(run / CONFIG_FILE).get("arguments", {})
    name = str(arguments.get("dataset_name"))
    found = find_dataset(name)
    places = [found.resolve()] if found else [each for each in data_sets if each.name == name]
    return arguments.get("eps") == -1 and any(place in data_sets for place in places)


def _holds_results(folder: Path, internal: bool) -> bool:
    """Whether a folder has results of evaluations, of a kind that the page shows."""
    places = [folder, folder / PRIVATE_FOLDER] if internal else [folder]
    files = [file for place in places for file in place.glob("*.json")]
    return any(json_object(file).get("tool") == file.stem for file in files)
