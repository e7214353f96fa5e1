"""What was spent on a private dataset by training runs and histograms of the same data.

    python -m privacy_checks.report outputs/mine --histogram histogram_ledger.jsonl
    python -m privacy_checks.report outputs/instructions outputs/answers

Reads the ledgers and refuses any that was edited, truncated or mixed with another's. Everything
is composed in one accountant, several runs as if each read the same rows, which is an upper bound
where they did not. Prints the report; --output also writes it as composed_report.json and .md,
with a plot of epsilon over steps. Exit code 1 if there is no guarantee, so that a script which
publishes on success publishes nothing.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from privacy_checks.composition import by_kind, composed_report, epsilon_over_steps
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import flag, positive_float, read_flags
from utils.files import write_atomic, write_json
from utils.privacy.accounting import ADD_REMOVE, REPLACE
from utils.privacy.guarantee import NEIGHBOURS, as_markdown, as_text, name_of_unit, render

PLOT_FILE = "epsilon_over_steps.png"
OUTPUT_FILES = ("composed_report.json", "composed_report.md", PLOT_FILE)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the composed report."""

    run: list[Path] = flag(
        "folder of a training run, outputs/JOB_SESS; all that read the same private rows",
        name="run",
        nargs="+",
        type=Path,
    )
    histogram: list[Path] = flag(
        "ledgers of histograms of the same private dataset",
        [],
        nargs="+",
        type=Path,
        metavar="LEDGER",
    )
    delta: float | None = flag(
        "the plan's if left out; needed where the plans of several runs differ in it",
        type=positive_float,
    )
    epsilon: float | None = flag(
        "also give delta at this epsilon; the plan's target, the largest of several, if left out",
        type=positive_float,
    )
    relation: list[str] = flag(
        "which datasets are neighbours", [ADD_REMOVE], nargs="+", choices=(ADD_REMOVE, REPLACE)
    )
    output: Path | None = flag("folder for the files", type=Path)


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    output = settings.output
    if output:
        for path in (output / name for name in OUTPUT_FILES):
            if path.exists():
                raise UsageError(f"{path} exists; use another --output")
    report = composed_report(
        settings.run,
        settings.histogram,
        settings.delta,
        settings.epsilon,
        list(dict.fromkeys(settings.relation)),
    )
    print(render(report, as_text))
    if output:
        if report["guarantee"]:
            report |= {"epsilon_over_steps": epsilon_over_steps(report), "plot": PLOT_FILE}
            write_atomic(output / PLOT_FILE, plot(report))
        write_json(output / OUTPUT_FILES[0], report)
        write_atomic(output / OUTPUT_FILES[1], render(report, as_markdown))
        say(f"written to {output}")
    return EXIT_OK if report["guarantee"] else EXIT_FAILED


def plot(report: dict) -> bytes:
    """A PNG of `epsilon_over_steps`, with the target and what was lost."""
    from matplotlib.figure import Figure

    relation = report["neighbouring_relations"][0]
    steps = [point["step"] for point in report["epsilon_over_steps"]]
    epsilons = [point["epsilon"] for point in report["epsilon_over_steps"]]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    label = "training" + (" and histograms" if by_kind(report["mechanisms"])[1] else "")
    axes.plot(steps, epsilons, marker=".", label=label)
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
