"""What every evaluation writes: scores with intervals and controls, one JSON file for each tool.

DIR/TOOL.json            from public texts and what a guarantee covers alone: may be released
DIR/private/TOOL.json    computed from private data without noise: never leaves

`evaluation.report` reads both, and shows the second kind with --internal only.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils.cli import UsageError, say
from utils.files import write_json
from utils.folders import private_folder
from utils.printable import printable
from utils.versions import versions_of

PRIVATE_FOLDER = "private"
# Ends the names of counts of personal data.
PER_TEXTS = " per 1,000 texts"
# The title of the chart of which a page shows one.
LENGTHS = "Lengths of the texts"
VERSIONED = ("torch", "transformers", "numpy", "faiss-cpu", "sentence-transformers")


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        name: what was measured, with its unit where it has one.
        subject: of which set or model.
        value, low, high: the figure and its interval; low and high are None where it has none.
        control: the same figure where nothing can have leaked or been learnt, if there is one.
        better: "higher", "lower" or "" where neither is.
        n: examples that the figure is of; None in results of earlier versions.
    """

    name: str
    subject: str
    value: float
    low: float | None = None
    high: float | None = None
    control: float | None = None
    better: str = ""
    n: int | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Attributes:
        lines: [x, y] points of each line, by its label.
        kind: "line", or "step" for histograms.
    """

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[list[float]]]
    kind: str = "line"


@dataclass(frozen=True)
class Result:
    """What one tool found.

    Attributes:
        tool: the module's name, which is the file's.
        title: a heading, in words for readers.
        private: computed from private data without noise.
        interval: what low and high of the scores are, in words.
        control: what the scores' controls are, in words; "" if they have none.
        notes: sentences that a reader needs in order to read the figures right.
    """

    tool: str
    title: str
    private: bool
    interval: str
    scores: list[Score]
    control: str = ""
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def require_new_result(folder: Path, tool: str) -> None:
    """Refuse, before any work, to replace what the tool wrote to `folder`.

    Raises:
        UsageError: there is a result already.
    """
    for path in (folder / f"{tool}.json", folder / PRIVATE_FOLDER / f"{tool}.json"):
        if path.exists():
            raise UsageError(f"{path} exists; use another --output, or remove it")


def write_result(folder: Path, result: Result, settings: dict) -> Path:
    """Write a result where its kind belongs, and say so; returns the file.

    Args:
        settings: flags and their values, none of them a secret.
    """
    place = private_folder(folder / PRIVATE_FOLDER) if result.private else folder
    origin = {"settings": settings, "argv": sys.argv, "versions": versions_of(VERSIONED)}
    path = place / f"{result.tool}.json"
    # Paths among the settings become text.
    write_json(path, json.loads(json.dumps(asdict(result) | origin, default=str)))
    say(f"written to {path}" + (" (private: no guarantee covers it)" if result.private else ""))
    return path


def read_results(folder: Path, private: bool) -> list[dict]:
    """The results in `folder`, in order of their names; those of its `private/` if asked.

    Raises:
        UsageError: a file is not a result.
    """
    results = []
    for path in sorted((folder / PRIVATE_FOLDER if private else folder).glob("*.json")):
        try:
            result = json.loads(path.read_text())
            known = result["tool"] == path.stem and result["private"] == private
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UsageError(f"{path} is not a result of an evaluation; move it elsewhere")
        results.append(result)
    return results


def shown(number: float) -> str:
    """A figure with four digits, or more where it is a large number."""
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"


def interval(low: float | None, high: float | None) -> str:
    """Low to high; "" where there is no interval."""
    return "" if low is None or high is None else f"{shown(low)} to {shown(high)}"


def table(result: Result) -> str:
    """The scores as lines for a terminal."""
    header = "", "", "value", "interval"
    rows: list[tuple[str, ...]] = [(*header, "control") if result.control else header]
    for score in result.scores:
        row = score.name, score.subject, shown(score.value), interval(score.low, score.high)
        control = "" if score.control is None else shown(score.control)
        rows.append((*row, control) if result.control else row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    text = "\n".join(
        [result.title, *lines, f"interval: {result.interval}"]
        + ([f"control: {result.control}"] if result.control else [])
        + result.notes
    )
    return printable(text)
