"""What was spent on a private dataset by training runs and histograms of the same data.

    python -m privacy_checks.report outputs/mine --histogram histogram_ledger.jsonl
    python -m privacy_checks.report outputs/instructions outputs/answers

Reads the ledgers and refuses any that was edited, truncated or mixed with another's. Everything
is composed in one accountant, several runs as if each read the same rows, which is an upper bound
where they did not. What else read the same data and is not named, next to these runs or below
outputs/, resampling/, embeddings/ and data/, is told of with what all spent together. Prints the
report; --output also writes it as composed_report.json and .md, with a plot of epsilon over steps.
Exit code 1 if there is no guarantee, or if all together spent more than a run was planned for: a
script which publishes on success publishes nothing then.

The ledgers' hash chains have no key: they show accidents, not a dishonest curator. --sign signs the
written report with the ledgers' heads and the adapters' hashes; --verify_key looks whether all of
that is what was signed, and exits with 1 if anything is not. Keys are Ed25519, PEM or OpenSSH's:

    openssl genpkey -algorithm ed25519 -out KEYFILE && chmod 600 KEYFILE
    openssl pkey -in KEYFILE -pubout -out PUBLIC_KEY
    python -m privacy_checks.report outputs/mine --output composed --sign KEYFILE
    python -m privacy_checks.report outputs/mine --output composed --verify_key PUBLIC_KEY

or `ssh-keygen -t ed25519 -N "" -f KEYFILE`, which writes KEYFILE.pub too.
"""

import io
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from privacy_checks.composition import (
    ALLOW_ABOVE_TARGET,
    by_kind,
    composed_report,
    curve_by_run,
    epsilon_over_steps,
    exit_code,
)
from privacy_checks.flags import SpentSettings
from privacy_checks.registry import with_left_out
from privacy_checks.signature import (
    SIGNATURE_FILE,
    differences,
    read_private_key,
    read_public_key,
    sign,
)
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import flag, positive_float, read_flags
from utils.files import write_atomic, write_json
from utils.folders import claimed, require_absent
from utils.printable import printable
from utils.privacy.accounting import ADD_REMOVE, REPLACE
from utils.privacy.guarantee import NEIGHBOURS, as_markdown, as_text, name_of_unit, render

PLOT_FILE = "epsilon_over_steps.png"
# matplotlib's, one a run.
MARKS = ("o", "s", "^", "D", "v", "P", "X")
OUTPUT_FILES = ("composed_report.json", "composed_report.md", PLOT_FILE)


@dataclass(frozen=True, kw_only=True)
class Settings(SpentSettings):
    """The flags of the composed report."""

    epsilon: float | None = flag(
        "also give delta at this epsilon; the plan's target, the largest of several, if left out",
        type=positive_float,
    )
    relation: list[str] = flag(
        "which datasets are neighbours", [ADD_REMOVE], nargs="+", choices=(ADD_REMOVE, REPLACE)
    )
    allow_above_target: bool = flag(ALLOW_ABOVE_TARGET, False)
    output: Path | None = flag("folder for the files", type=Path)
    sign: Path | None = flag(
        "sign what is written to --output with this private key", type=Path, metavar="KEYFILE"
    )


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    settings.require_runs()
    output = settings.output
    if (settings.sign or settings.verify_key) and not output:
        raise UsageError("--sign and --verify_key need --output, the folder of the report")
    if output and settings.verify_key:
        public = read_public_key(settings.verify_key)
        return verify(differences(output, OUTPUT_FILES, settings.run, settings.histogram, public))
    with claimed(output) if output else nullcontext():
        return write_report(settings)


def write_report(settings: Settings) -> int:
    """Compose, show and, where there is an output, write and sign; returns the exit code."""
    output = settings.output
    key = read_private_key(settings.sign) if settings.sign else None
    if output:
        require_absent(output, (*OUTPUT_FILES, SIGNATURE_FILE))
    relations = list(dict.fromkeys(settings.relation))
    report = composed_report(
        settings.run,
        settings.histogram,
        settings.delta,
        settings.epsilon,
        relations,
    )
    if report["guarantee"]:
        report = with_left_out(report, settings.run, settings.histogram, relations)
    print(printable(render(report, as_text)))
    if output:
        if report["guarantee"]:
            report |= {"epsilon_over_steps": epsilon_over_steps(report), "plot": PLOT_FILE}
            write_atomic(output / PLOT_FILE, plot(report))
        write_json(output / OUTPUT_FILES[0], report)
        write_atomic(output / OUTPUT_FILES[1], render(report, as_markdown))
        say(f"written to {output}")
        if key:
            say(f"signed: {sign(output, OUTPUT_FILES, settings.run, settings.histogram, key)}")
    return exit_code(report, settings.allow_above_target)


def verify(found: list[str]) -> int:
    """Say whether all is as it was signed; returns the exit code."""
    for line in found:
        say(line)
    print("NOT VERIFIED: do not rely on this report" if found else "verified: all is as signed")
    return EXIT_FAILED if found else EXIT_OK


def plot(report: dict) -> bytes:
    """A PNG of `epsilon_over_steps`, with the target and what was lost."""
    from matplotlib.figure import Figure

    relation = report["neighbouring_relations"][0]
    curves = curve_by_run(report, report["epsilon_over_steps"])
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    rest = " and histograms" if by_kind(report["mechanisms"])[1] else ""
    for (run, points), mark in zip(curves.items(), cycle(MARKS)):
        label = run if len(curves) > 1 else "training"
        axes.plot(*zip(*points), marker=mark, markersize=4, label=label + rest)
    if report["delta"] == report.get("target_delta"):
        axes.axhline(report["target_epsilon"], linestyle="--", color="grey", label="target")
    if report["steps_lost"]:
        without = report["epsilon_without_lost_steps"][relation]["upper"]
        axes.plot(report["steps_taken"], without, "x", label="without lost steps")
    axes.set_xlabel("logical steps")
    axes.set_ylabel(f"epsilon at delta {report['delta']:g}")
    neighbours = NEIGHBOURS[relation].replace("example", name_of_unit(report))
    axes.set_title(f"Privacy spent, for {neighbours}", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    run_cli(main)
