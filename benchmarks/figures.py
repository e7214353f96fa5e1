"""What becomes of figures: a table to read and, with --json, a file."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.command_line.parser import make_parser
from utils.files import write_json

# Flags that say where things are on this machine, and not how the figures came about.
LOCAL = ("json", "work_dir", "texts", "instructions", "jobs", "measure")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flag of every benchmark that measures."""

    json: Path | None

    def on_record(self) -> dict:
        """The flags that decide the figures."""
        return {name: value for name, value in asdict(self).items() if name not in LOCAL}

    def write(self, figures: dict | list) -> None:
        """Write the figures where --json has them."""
        if self.json:
            write_json(self.json, figures)


def benchmark_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with --json."""
    parser = make_parser(docstring)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; the first column is of names, the others of figures."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown, for docs/."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))
