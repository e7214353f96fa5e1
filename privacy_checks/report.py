"""What was spent on a private dataset by training runs and histograms of the same data.

    python -m privacy_checks.report outputs/mine --histogram histogram_ledger.jsonl
    python -m privacy_checks.report outputs/instructions outputs/answers

Reads the ledgers and refuses any that was edited, truncated or mixed with another's. Everything
is composed in one accountant, several runs as if each read the same rows, which is an upper bound
where they did not. Prints the report; --output also writes it as composed_report.json and .md,
with a plot of epsilon over steps. Exit code 1 if there is no guarantee, so that a script which
publishes on success publishes nothing.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

from privacy_checks.composition import _by_kind, _listed, composed_report, epsilon_over_steps
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import make_parser, positive_float
from utils.files import write_atomic, write_json
from utils.privacy.accounting import (
    ADD_REMOVE,
    REPLACE,
)

OUTPUT_FILES = ("composed_report.json", "composed_report.md", "epsilon_over_steps.png")
PLOT_LINE = f"![Epsilon over the steps of training]({OUTPUT_FILES[2]})"
NEIGHBOURS = {
    ADD_REMOVE: "adding or removing one example",
    REPLACE: "replacing one example by another",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of the composed report."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "run",
        type=Path,
        nargs="+",
        help="folder of a training run, outputs/JOB_SESS; all that read the same private rows",
    )
    parser.add_argument(
        "--histogram",
        type=Path,
        nargs="+",
        default=[],
        metavar="LEDGER",
        help="ledgers of histograms of the same private dataset",
    )
    parser.add_argument(
        "--delta",
        type=positive_float,
        default=None,
        help="the plan's if left out; needed where the plans of several runs differ in it",
    )
    parser.add_argument(
        "--epsilon",
        type=positive_float,
        default=None,
        help="also give delta at this epsilon; the plan's target, the largest of several, if left "
        "out",
    )
    parser.add_argument(
        "--relation",
        nargs="+",
        choices=(ADD_REMOVE, REPLACE),
        default=[ADD_REMOVE],
        help="which datasets are neighbours",
    )
    parser.add_argument("--output", type=Path, default=None, help="folder for the files")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.output:
        for name in OUTPUT_FILES:
            if (args.output / name).exists():
                raise UsageError(f"{args.output / name} exists; use another --output")
    report = composed_report(
        args.run, args.histogram, args.delta, args.epsilon, tuple(dict.fromkeys(args.relation))
    )
    print(render(report, as_text))
    if args.output:
        if report["guarantee"]:
            report["epsilon_over_steps"] = epsilon_over_steps(report)
            write_atomic(args.output / OUTPUT_FILES[2], plot(report))
        write_json(args.output / OUTPUT_FILES[0], report)
        write_atomic(args.output / OUTPUT_FILES[1], render(report, as_markdown))
        say(f"written to {args.output}")
    return EXIT_OK if report["guarantee"] else EXIT_FAILED


# ------------------------------------------------------------------------ what was done


# ------------------------------------------------------------------------ what it costs


def plot(report: dict) -> bytes:
    """A PNG of `epsilon_over_steps`, with the target and what was lost beside it."""
    from matplotlib.figure import Figure

    relation = report["neighbouring_relations"][0]
    steps = [point["step"] for point in report["epsilon_over_steps"]]
    epsilons = [point["epsilon"] for point in report["epsilon_over_steps"]]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    label = "training" + (" and histograms" if _by_kind(report["mechanisms"])[1] else "")
    axes.plot(steps, epsilons, marker=".", label=label)
    if report["delta"] == report.get("target_delta"):
        axes.axhline(report["target_epsilon"], linestyle="--", color="grey", label="target")
    if report["steps_lost"]:
        seen = report["epsilon_if_lost_steps_were_seen"][relation]["upper"]
        axes.plot(
            report["steps_taken"] + report["steps_lost"], seen, "x", label="if lost steps were seen"
        )
    axes.set_xlabel("logical steps")
    axes.set_ylabel(f"epsilon at delta {report['delta']:g}")
    axes.set_title(f"Privacy spent, for {NEIGHBOURS[relation]}", fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ------------------------------------------------------------------------ how it is told

Table = list[list[str]]
Section = tuple[str, list[str], Table, list[str]]  # title, paragraphs, rows (first: header), items


def render(report: dict, style: Callable[..., str]) -> str:
    """The report as a page.

    Args:
        style: `as_text` or `as_markdown`, which lay out one section.
    """
    return "\n".join(style(*section) for section in _sections(report))


def _sections(report: dict) -> list[Section]:
    lists = [
        (title, [], [], report[key] or ["nothing"])
        for title, key in (("Covered", "covered"), ("Not covered", "not_covered"))
    ]
    if not report["guarantee"]:
        verdict = f"THERE IS NO PRIVACY GUARANTEE for {report['run']}: {report['why']}."
        return [("Privacy report", [verdict], [], []), *lists]
    composed = [
        ["mechanism", "sampling rate", "noise multiplier", "times"],
        *(
            [entry["mechanism"], f"{entry['sampling_rate']:.6g}",
             f"{entry['noise_multiplier']:g}", f"{entry['times']}"]
            for entry in report["mechanisms"]
        ),
    ]  # fmt: skip
    histograms = len(_by_kind(report["mechanisms"])[1])
    what = report["run"] + (f" with {histograms} histogram(s)" if histograms else "")
    runs = report.get("runs", [report])
    verb = "is" if len(runs) == 1 else "are together"
    paragraphs = [
        f"{what} {verb} ({report['epsilon'][name]['upper']:.3f}, {report['delta']:g})"
        f"-differentially private for {NEIGHBOURS[name]} ({name})."
        for name in report["neighbouring_relations"]
    ]
    sizes, clip_norms = ([run[name] for run in runs] for name in ("num_examples", "clip_norm"))
    paragraphs.append(
        f"One example is {report['unit'].removeprefix('one example: ')}. "
        f"N = {_listed(sizes)}, the sampling rate, the number of steps and the clip norm "
        f"{_listed(clip_norms)} are public constants."
    )
    if len(runs) > 1:
        paragraphs.append(
            "The runs are composed as if each read the same rows; where they read different ones, "
            "this is an upper bound."
        )
    if unfinished := report["steps_planned"] - report["steps_taken"]:
        paragraphs.append(f"{unfinished} of {report['steps_planned']} planned steps are not taken.")
    if report["steps_lost"]:
        seen = " and ".join(
            f"{entry['upper']:.3f} ({name})"
            for name, entry in report["epsilon_if_lost_steps_were_seen"].items()
        )
        paragraphs.append(
            f"{report['steps_lost']} further steps were noised and then lost in a crash; they are "
            f"in no released model. If somebody had watched them, epsilon would be {seen}."
        )
    epsilons = [["relation", "lower", "estimate", "upper", "PLD", "PRV", "accountant"]]
    deltas, at_epsilon = [["relation", "delta", "epsilon"]], [["relation", "epsilon", "delta"]]
    for name in report["neighbouring_relations"]:
        entry = report["epsilon"][name]
        numbers = [entry[key] for key in ("lower", "estimate", "upper", "pld", "prv")]
        epsilons.append(
            [name, *("-" if n is None else f"{n:.3f}" for n in numbers), entry["accountant"]]
        )
        deltas += [
            [name, f"{point['delta']:g}", f"{point['epsilon']:.3f}"]
            for point in report["epsilon_at_other_deltas"][name]
        ]
        point = report["delta_at_epsilon"][name]
        at_epsilon.append([name, f"{point['epsilon']:g}", f"{point['delta']:.3g}"])
    return [
        ("Privacy report", paragraphs, [], []),
        ("Composed in one accountant", [], composed, []),
        (f"Epsilon at delta {report['delta']:g}", [], epsilons, []),
        ("Epsilon at other deltas", [], deltas, []),
        ("Delta at a given epsilon", [], at_epsilon, []),
        *([("Epsilon over steps", [PLOT_LINE], [], [])] if "epsilon_over_steps" in report else []),
        ("Ledger", [], [], report["checks"]),
        *lists,
    ]


def as_text(title: str, paragraphs: list[str], table: Table, items: list[str]) -> str:
    """A section for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table)]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
    return "\n".join([title.upper(), *paragraphs, *rows, *(f"- {item}" for item in items), ""])


def as_markdown(title: str, paragraphs: list[str], table: Table, items: list[str]) -> str:
    """A section of a Markdown page."""
    lines = [f"# {title}" if title == "Privacy report" else f"## {title}", ""]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    rows = ["| " + " | ".join(row) + " |" for row in table]
    rows[1:1] = ["|" + "---|" * len(table[0])] if table else []
    bullets = [f"- {item}" for item in items]
    return "\n".join([*lines, *rows, *bullets]).rstrip() + "\n"


if __name__ == "__main__":
    run_cli(main)
