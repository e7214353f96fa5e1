"""Give each row of a private data set the topic of its own text.

    python -m topics.assign --private data/mine --topics resampling/topics --output data/mine_topics

Writes a data set that training takes with --prompt_style topic_generation: each split with
`instruction`, `topic` (the keywords of the nearest topic) and the column of --unit_column, or
without one the columns that are likely to say whose a row is, of which training warns. All of
OUTPUT is private, and its owner alone may enter it; a row's topic is a part of the row. Its
private/ has what `python -m topics.histogram` counts.

A row's topic depends on the row and on the topics alone, to the last bit: each text is embedded
by itself, not in a batch with others, on devices of one kind, and the nearest centre is found in
exact arithmetic. The rows of the train split and their order stay, so that a run on OUTPUT, a run
on the data set that it was made of, and histograms of either are known to have read the same rows.

A stopped run goes on with the same command, on any number of devices; until then the embeddings,
which are private, lie next to OUTPUT in .OUTPUT.embeddings.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, command_line, flag, read_flags
from utils.texts.units import OWNERS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `assign`."""

    private: str = flag(
        "the private data set, which is here: a name, or a path", required=True, metavar="DATA"
    )
    topics: Path = flag("the --output of fit", required=True, type=Path, metavar="TOPICS")
    output: Path = flag("folder, which must not exist", required=True, type=Path, metavar="DATASET")
    unit_column: str | None = flag(
        "column that says whose a row is, such as user_id, for training with the same flag; the "
        "histogram then is for all rows of one person (or whatever the column tells apart)"
    )
    owner: str | None = flag(
        "which owner counts where --unit_column holds lists, which are refused otherwise",
        choices=OWNERS,
    )
    unowned_rows_are_units: bool = flag(
        "rows without a value in --unit_column are units of their own; they are refused otherwise",
        False,
    )
    devices: list[str] | None = flag(
        "one process each, all of one kind, such as cuda:0 cuda:1; all GPUs if left out, or else "
        "the CPU",
        nargs="+",
        metavar="DEVICE",
    )


answer_early(__name__, Settings, __doc__)

import shlex
import shutil
from typing import TYPE_CHECKING

import numpy as np

from resample_with_dp_histogram.embed import (
    begin,
    common_kind,
    default_devices,
    embed,
    load_model,
    manifest_of,
)
from resample_with_dp_histogram.embeddings import (
    PRIVATE_FOLDER,
    location,
    open_vectors,
    units_digest,
    write_identity,
)
from topics.folder import (
    ASSIGNMENT_FILE,
    LEDGER_FOLDER,
    NUMBERS_FILE,
    TOPIC_COLUMN,
    TOPICS_FILE,
    TRAIN_FILE,
    Topics,
    read_topics,
    write_arrays,
)
from utils.cli import UsageError, run_cli, say
from utils.files import json_lines, sha256_of, write_atomic, write_json
from utils.folders import PREPARATION_FILE, claimed, private_folder, require_new, whole_folder
from utils.models.loading import model_fingerprint
from utils.texts.data_sets import find_dataset, is_labelled, rows_fingerprint, tried_places
from utils.texts.rows import pick, raw_rows, row_of, split_files
from utils.texts.units import largest_units, read_units, require_column

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    with claimed(settings.output):
        assign(settings)


def assign(settings: Settings) -> None:
    """Read, embed each row by itself, and write."""
    output = settings.output
    whole = output.resolve()
    work = whole.with_name(f".{whole.name}.embeddings")
    if (output / PRIVATE_FOLDER / ASSIGNMENT_FILE).exists():
        # A kill between the last two steps left them.
        shutil.rmtree(work, ignore_errors=True)
    if (output / LEDGER_FOLDER).exists():
        raise UsageError(
            f"--output {str(output)!r} exists and has the ledger of its histograms, without which "
            "nobody knows that they were paid for; name another"
        )
    require_new(output)
    if is_labelled(str(output)):
        raise UsageError(
            f"--output {str(output)!r}: a name that starts with 'labelled' is for pairs, and "
            "topics are for instructions; choose another name"
        )
    require_column(settings.unit_column, settings.owner, settings.unowned_rows_are_units)
    devices = settings.devices or default_devices()
    kind = common_kind(devices)
    topics = read_topics(settings.topics)
    splits = read_splits(settings.private, settings.unit_column)
    texts = {name: [row["instruction"] for row in rows] for name, rows in splits.items()}
    require_others(topics, {text for split in texts.values() for text in split})
    units = None
    if settings.unit_column is not None:
        units = read_units(
            settings.private,
            settings.unit_column,
            owner=settings.owner,
            unowned_rows_are_units=settings.unowned_rows_are_units,
        )
    model = load_model(topics.record["model"])
    if model_fingerprint(model) != topics.record["model_fingerprint"]:
        raise UsageError(
            f"{topics.folder} was fitted with another model than the {topics.record['model']} that "
            "is here now; fit the topics anew"
        )
    facts = {
        "topics_sha256": sha256_of(settings.topics / TOPICS_FILE),
        "model": topics.record["model"],
        "model_fingerprint": topics.record["model_fingerprint"],
        "kind_of_device": kind,
        "unit_column": settings.unit_column,
        "owner": settings.owner,
        "units_sha256": None if units is None else units_digest(units),
    }
    private_folder(work, explained=False)
    keywords, numbers = topics.keywords, {}
    for name, those in texts.items():
        vectors = embedded(those, model, work, name, facts, devices)
        numbers[name] = topics.clusters.assign(vectors, f"{settings.private}, {name}")
    own = command_line("topics.assign", Settings, settings)
    with whole_folder(output) as folder:
        private_folder(folder)
        for name, rows in splits.items():
            of_rows = (keywords[number] for number in numbers[name])
            lines = json_lines(row | {TOPIC_COLUMN: each} for row, each in zip(rows, of_rows))
            write_atomic(folder / f"{name}.jsonl", lines)
        preparation = {
            "private": "all of this folder: rows, their topics, and how many there are",
            "command": own,
            "unit_column": settings.unit_column,
            "splits": {name: len(rows) for name, rows in splits.items()},
        }
        write_json(folder / PREPARATION_FILE, preparation)
        hidden = private_folder(folder / PRIVATE_FOLDER)
        fingerprint = rows_fingerprint(texts["train"])
        write_identity(hidden, fingerprint)
        of_units = {} if units is None else {"units": units}
        write_arrays(hidden / NUMBERS_FILE, topics=numbers["train"], **of_units)
        assignment = {
            "keywords": keywords,
            "fitted_on": topics.record["fitted_on"],
            "unit_column": settings.unit_column,
            "owner": settings.owner,
            "rows_fingerprint": fingerprint,
            "commands": [*topics.record["commands"], own],
            "outputs_sha256": {
                TRAIN_FILE: sha256_of(folder / TRAIN_FILE),
                NUMBERS_FILE: sha256_of(hidden / NUMBERS_FILE),
            },
        }
        write_json(hidden / ASSIGNMENT_FILE, assignment)
    shutil.rmtree(work)
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items())
    say(f"wrote {output} (private): {sizes}")
    say(f"next: python -m topics.histogram --assigned {shlex.quote(str(output))} --output DIR")


def embedded(
    texts: list[str],
    model: "SentenceTransformer",
    work: Path,
    split: str,
    facts: dict,
    devices: list[str],
) -> np.ndarray:
    """Embed each text of a split by itself, or go on where an earlier run was stopped.

    Args:
        work: the embeddings of all splits.
        facts: what they follow from but for the texts, see `manifest_of`.

    Returns:
        float16 [texts, dimensions], unit vectors.
    """
    manifest = manifest_of(
        work / split,
        True,
        facts | {"texts_sha256": rows_fingerprint(texts)},
        {"num_texts": len(texts), "dimensions": model.get_embedding_dimension()},
        f"go on with what it was begun with, or remove {work} to begin anew",
    )
    folder = location(work / split, True)
    begin(folder, True, manifest)
    # One text at a time: in a batch, its company would decide the last bits of its embedding.
    embed(texts, model, folder, manifest, 1, devices)
    return open_vectors(folder, manifest, "r")


def read_splits(data: str, unit_column: str | None) -> dict[str, list[dict]]:
    """The rows of each split of a data set, as training reads them.

    Args:
        data: a name of `find_dataset`.

    Returns:
        `instruction`, and what the column of units holds; without one, the columns of owners, or a
        run on these rows would not notice that persons have several.

    Raises:
        UsageError: there is no such data set or column, no train split, or a split without rows.
    """
    path = find_dataset(data)
    if path is None:
        raise UsageError(tried_places(data))
    if unit_column in ("instruction", TOPIC_COLUMN):
        raise UsageError(f"--unit_column {unit_column}: the output has another column of this name")
    splits = {"train": [path]} if path.is_file() else split_files(path)
    if "train" not in splits:
        raise UsageError(f"--private {data!r} has no train split, only {', '.join(splits)}")
    owners = [unit_column] if unit_column else [*largest_units(data)]
    found: dict[str, list[dict]] = {name: [] for name in splits}
    for name, files in splits.items():
        for file in files:
            for number, value in enumerate(raw_rows(file, ["instruction", *owners]), start=1):
                place = f"{file}, entry {number}"
                row = row_of(value, place)
                kept: dict = pick(file, number, row, {"instruction": ("instruction",)})
                if unit_column and unit_column not in row:
                    raise UsageError(f"--unit_column {unit_column}: {place} has no such column")
                found[name].append(kept | {each: row[each] for each in owners if each in row})
    if empty := [name for name, rows in found.items() if not rows]:
        raise UsageError(f"--private {data!r} has no row in {', '.join(empty)}; remove that split")
    return found


def require_others(topics: Topics, private: set[str]) -> None:
    """Refuse topics that were fitted on the private rows themselves.

    Args:
        private: the texts of all splits. A few may be among public ones, too, such as greetings.
    """
    examples = {text for topic in topics.record["topics"] for text in topic["examples"]}
    shown = len(examples & private)
    if 2 * shown > len(examples):
        raise UsageError(
            f"{topics.folder}: {shown:,} of the {len(examples):,} texts that it shows are private "
            "rows, so it was fitted on them and is private itself; fit topics on public or on "
            "synthetic texts"
        )


if __name__ == "__main__":
    run_cli(main)
