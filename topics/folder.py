"""What `fit` and `assign` leave for the commands after them.

TOPICS/topics.json            each topic: its number, keywords and examples; how they were found
TOPICS/clusters.npz           the centres, as `Clusters` holds them
DATASET/private/topics.npz    the topic of each row of the train split, and whose row it is
DATASET/private/assignment.json   the topics' keywords, the unit, and hashes of the files
DATASET/ledger/               the ledger of its histograms, where no flag names another
DIR/topic_histogram.json      of `histogram`: the noisy count of each topic
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resample_with_dp_histogram.clusters import Clusters
from utils.cli import UsageError
from utils.files import required_object, sha256_of, write_atomic
from utils.texts.topic_histogram import require_keywords

TOPICS_FILE, CLUSTERS_FILE = "topics.json", "clusters.npz"
NUMBERS_FILE, ASSIGNMENT_FILE = "topics.npz", "assignment.json"
HISTOGRAM_FILE = "topic_histogram.json"
TRAIN_FILE, TOPIC_COLUMN = "train.jsonl", "topic"
# Of a data set; a ledger next to the splits would pass for one.
LEDGER_FOLDER = "ledger"


@dataclass(frozen=True)
class Topics:
    """A folder of `fit`.

    Attributes:
        record: what its topics.json says.
    """

    folder: Path
    record: dict[str, Any]
    clusters: Clusters

    @property
    def keywords(self) -> list[str]:
        """Of each topic, in the order of their numbers, in one text."""
        return [topic["keywords"] for topic in self.record["topics"]]


@dataclass(frozen=True)
class Assignment:
    """What `assign` found.

    Attributes:
        record: what its assignment.json says.
        topics: int32 [rows of the train split].
        units: int64 [rows], whose each row is; None where each is a unit of its own.
    """

    folder: Path
    record: dict[str, Any]
    topics: np.ndarray
    units: np.ndarray | None

    @property
    def num_examples(self) -> int:
        """N: the units, or the rows where each is one."""
        return len(self.topics if self.units is None else np.unique(self.units))


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file."""
    # Not by its name: numpy's own way of writing to a file does not say that a disk is full.
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())


def read_topics(folder: Path) -> Topics:
    """Open a folder of `fit`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / TOPICS_FILE
    record = _read_record(
        path, "topics.fit", {CLUSTERS_FILE: folder},
        topics=list, model=str, model_fingerprint=str, fitted_on=str, commands=list,
    )  # fmt: skip
    with np.load(folder / CLUSTERS_FILE) as file:
        clusters = Clusters(file["weights"], file["offsets"], int(file["num_components"]))
    found, needed = len(record["topics"]), len(clusters.offsets)
    if found != needed:
        raise UsageError(
            f"{path} has {found:,} topics for {needed:,} centres; restore it, or make it anew"
        )
    for number, topic in enumerate(record["topics"]):
        place, topic = f"{path}, topic {number}", topic if isinstance(topic, dict) else {}
        require_keywords(topic.get("keywords"), place)
        if not isinstance(topic.get("examples"), list):
            raise UsageError(f"{place} has no `examples`: a list; restore it, or make it anew")
    return Topics(folder, record, clusters)


def read_assignment(folder: Path) -> Assignment:
    """Open a data set of `assign`.

    Raises:
        UsageError: there is none, it is damaged, or its rows are not those that got the topics.
    """
    private = folder / "private"
    files = {NUMBERS_FILE: private, TRAIN_FILE: folder}
    record = _read_record(
        private / ASSIGNMENT_FILE, "topics.assign", files,
        keywords=list, fitted_on=str, rows_fingerprint=str, commands=list,
    )  # fmt: skip
    with np.load(private / NUMBERS_FILE) as file:
        return Assignment(folder, record, file["topics"], file.get("units"))


def _read_record(path: Path, writer: str, files: dict[str, Path], **kinds: type) -> dict[str, Any]:
    """A record, once the files that it is of are as it says.

    Args:
        writer: the command that wrote it.
        files: their folders, by name.
        kinds: the type of each entry that is needed.
    """
    if not path.is_file():
        raise UsageError(f"no {path}; make it with python -m {writer}")
    record = required_object(path, f"make it anew with python -m {writer}")
    for name, folder in files.items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != record.get("outputs_sha256", {}).get(name):
            raise UsageError(
                f"{file} is not what {path} says that {writer} wrote; restore it, or make it anew"
            )
    for entry, kind in kinds.items():
        if not isinstance(record.get(entry), kind):
            raise UsageError(f"{path} has no {entry!r} of {writer}; restore it, or make it anew")
    return record
