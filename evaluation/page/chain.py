"""Whether the texts of a page lead back to samples of a named run, by the hashes of files.

    sampling (the adapter's hash) -> shards -> extraction -> selection -> annotation

Every stage's record names the SHA-256 of the files that it read and wrote. The records have no key:
they show that files were mixed up, not that somebody made them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.cli import UsageError
from utils.files import sha256_of

READ, WRITTEN = "inputs_sha256", "outputs_sha256"


class Stage(NamedTuple):
    """A stage: the flag of the page, the file of its record, what it reads, how to get hashes."""

    flag: str
    record: str
    source: str
    remedy: str


SAMPLES = Stage(
    "--samples", "manifest.json", "",
    "give its inference command again, which draws only what is missing and adds them",
)  # fmt: skip
EXTRACTION = Stage(
    "--extraction", "preparation.json", "--samples", "run extract again, with another --output",
)  # fmt: skip
SELECTION = Stage(
    "--selection", "resampling_report.json", "--extraction or --samples",
    "select again from what extract writes now, with another --output (one more histogram is "
    "spent), or leave it out",
)  # fmt: skip
ANNOTATIONS = Stage(
    "--annotations", "manifest.json", "--selection, --extraction or --samples",
    "give its annotate command again, which pays for nothing twice and adds them",
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A folder of a stage.

    Attributes:
        record: what the stage's file in it says.
        files: those in it that hold the texts; none if no later stage reads it.
        is_source: whether its texts may be what a later stage was made of.
    """

    stage: Stage
    folder: Path
    record: dict
    files: Sequence[Path] = ()
    is_source: bool = True


def require_chain(links: Sequence[Link]) -> None:
    """Refuse texts that do not lead back to the first stage's.

    Args:
        links: the folders of a page, each after those that it may be made of.

    Raises:
        UsageError: names the first link that is broken, and what to do.
    """
    known: set[str] = set()
    for link in links:
        stage, where = link.stage, f"{link.stage.flag} {link.folder}"
        written = _hashes(link, WRITTEN) if link.files else {}
        for file in link.files:
            if not file.is_file() or written.get(file.name) != sha256_of(file):
                raise UsageError(
                    f"{where}: {file.name} is not what {stage.record} says was written, so its "
                    "texts may be private rows; restore it, or make the folder again under "
                    "another name"
                )
        for path, digest in (_hashes(link, READ) if stage.source else {}).items():
            if digest not in known:
                raise UsageError(
                    f"{where}: made of {path}, which leads back to no run named here, so it may "
                    f"hold private rows; name the {stage.source} that wrote it, or leave "
                    f"{stage.flag} out"
                )
        known |= set(written.values()) if link.is_source else set()


def _hashes(link: Link, key: str) -> dict[str, str]:
    """Hashes of a record; those of earlier versions had none."""
    hashes = link.record.get(key)
    if not isinstance(hashes, dict) or not hashes:
        raise UsageError(
            f"{link.stage.flag} {link.folder}: its {link.stage.record} has no {key} (it is an "
            "earlier version's, or unfinished), so nothing shows where its texts come from; "
            f"{link.stage.remedy}"
        )
    return hashes
