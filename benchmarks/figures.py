"""How a benchmark is asked and how it answers: flags, tables, and with --json a file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.command_line.parser import flag
from utils.files import write_json

# Flags that say where things are on this machine, and not how the figures came about.
LOCAL = ("json", "work_dir", "texts", "instructions", "jobs", "measure", "arms", "only")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of a benchmark, each a field; those of all of them."""

    json: Path | None = flag("also write the figures here", type=Path, metavar="FILE")

    def on_record(self) -> dict:
        """The flags that decide the figures."""
        return {name: value for name, value in asdict(self).items() if name not in LOCAL}

    def write(self, figures: dict | list) -> None:
        """Write the figures where --json has them."""
        if self.json:
            write_json(self.json, figures)


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
