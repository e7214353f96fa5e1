"""The flags of the commands that say what was spent on one private data set."""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import UsageError
from utils.command_line.parser import flag, positive_float


@dataclass(frozen=True, kw_only=True)
class SpentSettings:
    """What was spent, and the key of whoever signed what is said of it."""

    run: list[Path] = flag(
        "folder of a training run, outputs/JOB_SESS; all that read the same private rows",
        [],
        name="run",
        nargs="*",
        type=Path,
    )
    histogram: list[Path] = flag(
        "ledgers of histograms of the same private data",
        [],
        nargs="+",
        type=Path,
        metavar="LEDGER",
    )
    delta: float | None = flag(
        "the plan's if left out; needed where the plans of several runs differ in it",
        type=positive_float,
    )
    verify_key: Path | None = flag(
        "write nothing; verify what is in --output and the state of the runs against the "
        "signature there, with this public key",
        type=Path,
        metavar="PUBLIC_KEY",
    )

    def require_runs(self) -> None:
        """Refuse a command line that names no run."""
        if not self.run:
            raise UsageError("name the RUNs: folders of training runs, outputs/JOB_SESS")
