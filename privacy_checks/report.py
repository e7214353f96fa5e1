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
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.accounting import (
    ADD_REMOVE,
    MAX_DELTA,
    MIN_DELTA,
    REPLACE,
    SampledGaussian,
    compute_delta,
    compute_epsilon,
    pld_epsilon,
)
from utils.arguments import make_parser, positive_float
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.files import write_atomic, write_json
from utils.privacy_plan import (
    COVERED,
    HISTOGRAM,
    LEDGER_FILE,
    NOT_COVERED,
    UNIT,
    PrivacyPlan,
    read_ledger,
    read_plan,
    require_head,
)
from utils.run_folder import CONFIG_FILE, holds_run

OUTPUT_FILES = ("composed_report.json", "composed_report.md", "epsilon_over_steps.png")
PLOT_LINE = f"![Epsilon over the steps of training]({OUTPUT_FILES[2]})"
HISTOGRAM_MECHANISM = "Gaussian histogram"
NEIGHBOURS = {
    ADD_REMOVE: "adding or removing one example",
    REPLACE: "replacing one example by another",
}
STEPS = ("steps_planned", "steps_taken", "steps_lost")
# Factors between delta and the other deltas of the table.
OTHER_DELTAS = (10, 0.1, 0.01)
CURVE_POINTS = 24
# The claim in privacy_report.json may come from another version of the accountant.
CLAIM_TOLERANCE = 0.02


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


def composed_report(
    runs: Path | Sequence[Path],
    histograms: Sequence[Path] = (),
    delta: float | None = None,
    epsilon: float | None = None,
    relations: Sequence[str] = (ADD_REMOVE,),
) -> dict:
    """Read the ledgers of runs and of histograms, check them, and compose them.

    Several runs are composed as if each read the same private rows: adding or removing one row
    then moves every one of them, so the result is an upper bound for rows that only some read.

    Args:
        runs: a run's folder or several, or copies that hold what may be released of them.
        histograms: ledgers of histograms of the same private data.
        delta, epsilon: where to evaluate the privacy curve. If None: the plans' delta, on which
            all runs must agree since a guarantee has one; the plans' largest target epsilon.
        relations: ADD_REMOVE, REPLACE or both.

    Returns:
        A JSON-able dict.

    Raises:
        UsageError: a ledger was edited, truncated or is another run's or another dataset's; a run
            is named twice; the runs' deltas differ and none is given; or no accountant can be
            trusted with the values.
    """
    runs = [_read_run(run) for run in ([runs] if isinstance(runs, Path) else runs)]
    for run in runs:
        if run.plan is None:
            return _no_guarantee(run)
    _require_distinct(runs)
    events = _histograms(histograms, [run.private_rows for run in runs])
    for run in runs:
        if run.without_guarantee:
            return _no_guarantee(run)
    if any(event["insecure"] for event in events):
        why = "a histogram's noise came from a known seed (a test)"
        return _no_guarantee(*runs, why=why)
    for run in runs:
        _require_claim(run)
    training = [run.mechanism(run.steps, len(runs) > 1) for run in runs]
    recorded = [run.mechanism(run.steps_recorded, len(runs) > 1) for run in runs]
    facts = [run.facts() for run in runs]
    not_covered = [
        *NOT_COVERED,
        "other runs and histograms of the same private dataset, whose ledgers are not named here: "
        "every one of them adds to epsilon",
    ]
    reserved = {run.plan.reserved_histogram_sigma for run in runs if run.plan.reserved}
    if reserved and not events:
        not_covered += [
            f"the histogram of sigma {sigma:g} that the run's target also pays for: name its "
            "ledger with --histogram once it is made"
            for sigma in sorted(reserved)
        ]
    return {
        "guarantee": True,
        "run": _names(runs),
        "unit": UNIT,
        "neighbouring_relations": list(relations),
        **(facts[0] if len(runs) == 1 else {"runs": facts}),
        "mechanisms": [*training, *events],
        **{name: sum(run[name] for run in facts) for name in STEPS},
        **_costs(
            [*training, *events],
            [*recorded, *events] if recorded != training else None,
            _common_delta(runs) if delta is None else delta,
            max(run.plan.target_epsilon for run in runs) if epsilon is None else epsilon,
            relations,
        ),
        "checks": [
            f"{run.folder}: {check}" if len(runs) > 1 else check
            for run in runs
            for check in run.checks
        ],
        "covered": COVERED + [f"the noisy histogram in {event['ledger']}" for event in events],
        "not_covered": not_covered,
    }


@dataclass(frozen=True)
class _Run:
    """What a run's folder says: nothing but `without_guarantee` where it was trained without DP.

    Attributes:
        without_guarantee: why there is no guarantee; "" if there is one.
        num_canary_rows: rows of N that are canaries, which only training reads.
        steps, steps_recorded: those in the released model, and in the ledger.
        ledger_end: its last chain value; chains begin with a random run id.
    """

    folder: Path
    without_guarantee: str
    plan: PrivacyPlan | None = None
    num_canary_rows: int = 0
    steps: int = 0
    steps_recorded: int = 0
    own_report: dict | None = None
    checks: Sequence[str] = ()
    ledger_end: str = ""

    @property
    def private_rows(self) -> int:
        """How many private examples the run read."""
        return self.plan.num_examples - self.num_canary_rows

    def mechanism(self, steps: int, named: bool) -> dict:
        """`steps` of training, as an entry of the composition."""
        training = f"training of {self.folder}" if named else "training"
        return {
            "mechanism": f"{training}, steps in the released model",
            "sampling_rate": self.plan.sampling_rate,
            "noise_multiplier": self.plan.noise_multiplier,
            "times": steps,
        }

    def facts(self) -> dict:
        """What the report says of this run alone."""
        return {
            "run": str(self.folder),
            "num_examples": self.plan.num_examples,
            "clip_norm": self.plan.clip_norm,
            "steps_planned": self.plan.steps,
            "steps_taken": self.steps,
            "steps_lost": self.steps_recorded - self.steps,
            "target_epsilon": self.plan.target_epsilon,
            "target_delta": self.plan.delta,
            "plan_hash": self.plan.digest(),
        }


def _names(runs: Sequence[_Run]) -> str:
    return " and ".join(str(run.folder) for run in runs)


def _no_guarantee(*runs: _Run, why: str = "") -> dict:
    return {
        "guarantee": False,
        "why": why or runs[0].without_guarantee,
        "run": _names(runs),
        "covered": [],
        "not_covered": ["everything: treat the adapter and all its outputs as private data"],
    }


def _listed(numbers: Sequence[float]) -> str:
    """Distinct numbers, for a sentence."""
    return " and ".join(f"{number:.15g}" for number in dict.fromkeys(numbers))


def _require_distinct(runs: Sequence[_Run]) -> None:
    """Refuse a run that is named twice, or beside its copy."""
    seen: dict[str, _Run] = {}
    for run in runs:
        if run.ledger_end in seen:
            other = seen[run.ledger_end].folder
            raise UsageError(f"{run.folder} and {other} hold the same run; name it once")
        seen[run.ledger_end] = run


def _common_delta(runs: Sequence[_Run]) -> float:
    """The delta of all plans: a guarantee has one, and none of several is everybody's."""
    deltas = {run.plan.delta for run in runs}
    if len(deltas) > 1:
        raise UsageError(
            f"the runs were planned for the deltas {_listed(sorted(deltas))}, and a guarantee has "
            "one; give --delta"
        )
    return deltas.pop()


def _read_json(path: Path, *needed: str) -> dict:
    """A JSON object that has the entries `needed`."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        raise UsageError(f"{path} is not JSON; restore it from a backup") from None
    for name in needed:
        if not isinstance(value, dict) or name not in value:
            raise UsageError(f"{path} has no {name!r}; restore it from a backup")
    return value


def _read_run(folder: Path) -> _Run:
    """Read a run, and check its ledger against all that kept the ledger's head."""
    if not holds_run(folder):
        raise UsageError(f"{folder} holds no run: there is no {CONFIG_FILE}")
    arguments = _read_json(folder / CONFIG_FILE, "arguments")["arguments"]
    if arguments["eps"] == -1:
        return _Run(folder, "trained without differential privacy")
    if not (folder / LEDGER_FILE).exists():
        raise UsageError(f"{folder} has no {LEDGER_FILE}: what its run spent is not known")
    plan = read_plan(folder / LEDGER_FILE)
    records = read_ledger(folder / LEDGER_FILE)
    steps, own_report, checks = _read_heads(folder, plan, records)
    known_seed = arguments["insecure_fixed_noise_seed"] is not None
    insecure = known_seed or not own_report.get("guarantee", True)
    return _Run(
        folder=folder,
        without_guarantee="noise and sampling came from a known seed (a test)" if insecure else "",
        plan=plan,
        # Runs of earlier versions have no such flags.
        num_canary_rows=arguments.get("num_canaries", 0) * arguments.get("canary_repeats", 1),
        steps=steps,
        steps_recorded=len(records) - 1,
        own_report=own_report,
        checks=checks,
        ledger_end=records[-1]["chain"],
    )


def _read_heads(run: Path, plan: PrivacyPlan, records: list[dict]) -> tuple[int, dict, list[str]]:
    """Steps in the released model, the run's own report, and what was checked.

    A checkpoint or a report keeps the ledger's head at its moment, and no step after the last of
    these is in any model that was saved.
    """
    ledger, report = run / LEDGER_FILE, run / "privacy_report.json"
    checks = [f"{ledger.name}: the hash chain of {len(records)} lines is whole"]
    needed = ("steps_taken", "ledger", "epsilon")
    own_report = _read_json(report, *needed) if report.exists() else {}
    if own_report.get("plan_hash", plan.digest()) != plan.digest():
        raise UsageError(f"{report} is of another plan than {ledger}; restore the run's own")
    if (run / "adapter").exists() and not own_report:
        raise UsageError(f"{run} has an adapter but no {report.name}; restore it")
    heads = {report: (own_report["steps_taken"], own_report["ledger"])} if own_report else {}
    for file in sorted(run.glob("checkpoints/step-*/state.json")):
        state = _read_json(file, "step", "ledger")
        heads[file] = (state["step"], state["ledger"])
    for file, (step, head) in heads.items():
        require_head(ledger, records, head)
        if records[head["lines"] - 1].get("step", 0) != step:
            raise UsageError(f"{file} counts {step} steps, which {ledger} does not; restore it")
        checks.append(f"{ledger.name} continues what {file.relative_to(run)} knew of it")
    if not heads:
        checks.append(
            f"nothing to compare {ledger.name} with: lines cut off its end would not be noticed, "
            "and every step in it is taken as released"
        )
        return len(records) - 1, own_report, checks
    last = max(head["lines"] for _, head in heads.values())
    return records[last - 1].get("step", 0), own_report, checks


def _require_claim(run: _Run) -> None:
    """Refuse a run whose own report claims less than its ledger gives."""
    if run.own_report.get("steps_taken") != run.steps:
        return
    claim = run.own_report["epsilon"]["upper"]
    spent = compute_epsilon(run.plan.events(run.steps), run.plan.delta).upper
    if claim < spent - CLAIM_TOLERANCE:
        raise UsageError(
            f"{run.folder / 'privacy_report.json'} claims epsilon {claim}, but its ledger gives "
            f"{spent:.3f}: the report was edited"
        )


def _histograms(paths: Sequence[Path], sizes: Sequence[int]) -> list[dict]:
    """The mechanisms in ledgers of histograms of what the runs read: `sizes` examples each."""
    events: dict[str, dict] = {}
    for path in paths:
        records = read_ledger(path) if path.is_file() else []
        if not records or records[0]["kind"] != HISTOGRAM:
            raise UsageError(f"no ledger of histograms at {path}")
        for record in records:
            if record["num_examples"] not in sizes:
                theirs = "the run's has" if len(sizes) == 1 else "the runs' have"
                raise UsageError(
                    f"{path} is of a private dataset of {record['num_examples']} examples, "
                    f"{theirs} {_listed(sizes)}: what is spent on two datasets does not compose; "
                    "make one report for each"
                )
            # Chains begin with a random run id, so equal ones are copies.
            if record["chain"] in events:
                other = events[record["chain"]]["ledger"]
                raise UsageError(f"{path} and {other} hold the same histogram; name it once")
            events[record["chain"]] = {
                "mechanism": HISTOGRAM_MECHANISM,
                "sampling_rate": 1.0,
                "noise_multiplier": record["noise_multiplier"] / record["sensitivity"],
                "times": 1,
                "ledger": str(path),
                "insecure": record["insecure"],
            }
    return list(events.values())


# ------------------------------------------------------------------------ what it costs


def events_of(mechanisms: list[dict]) -> list[SampledGaussian]:
    """What an accountant composes, of a report's "mechanisms"."""
    return [
        SampledGaussian(entry["sampling_rate"], entry["noise_multiplier"], entry["times"])
        for entry in mechanisms
    ]


def _costs(
    mechanisms: list[dict],
    with_lost_steps: list[dict] | None,
    delta: float,
    epsilon: float,
    relations: Sequence[str],
) -> dict:
    """Epsilon at `delta` and at others, and delta at `epsilon`, by relation."""
    events = events_of(mechanisms)
    others = [delta * factor for factor in OTHER_DELTAS]
    return {
        "delta": delta,
        "epsilon": {name: _epsilons(events, delta, name) for name in relations},
        "epsilon_if_lost_steps_were_seen": with_lost_steps
        and {name: _epsilons(events_of(with_lost_steps), delta, name) for name in relations},
        "epsilon_at_other_deltas": {
            name: [
                {"delta": other, "epsilon": compute_epsilon(events, other, name).upper}
                for other in others
                if MIN_DELTA <= other <= MAX_DELTA
            ]
            for name in relations
        },
        "delta_at_epsilon": {
            name: {"epsilon": epsilon, "delta": compute_delta(events, epsilon, name)}
            for name in relations
        },
    }


def _epsilons(events: list[SampledGaussian], delta: float, relation: str) -> dict:
    bounds = compute_epsilon(events, delta, relation)
    pld = pld_epsilon(events, delta, relation)
    return {
        "lower": bounds.lower,
        "estimate": bounds.estimate,
        "upper": bounds.upper,
        "pld": pld if math.isfinite(pld) else None,
        "accountant": bounds.accountant,
    }


def epsilon_over_steps(report: dict, points: int = CURVE_POINTS) -> list[dict]:
    """Epsilon of all mechanisms together after some of the steps that were taken.

    Several runs count one after the other, in the order in which they were named.

    Args:
        report: of `composed_report`; its first relation and its delta are used.
        points: at most this many, evenly spaced.

    Returns:
        One {"step", "epsilon"} a point; upper bounds.
    """
    training, histograms = _by_kind(report["mechanisms"])
    relation = report["neighbouring_relations"][0]
    taken = sum(entry["times"] for entry in training)
    count = min(points - 1, taken)
    curve = []
    for step in sorted({round(taken * i / max(1, count)) for i in range(count + 1)}):
        events = events_of([*_first_steps(training, step), *histograms])
        # PLD is an upper bound too, and the quicker one of the two.
        epsilon = pld_epsilon(events, report["delta"], relation)
        if not math.isfinite(epsilon):
            epsilon = compute_epsilon(events, report["delta"], relation).upper
        curve.append({"step": step, "epsilon": epsilon})
    return curve


def _by_kind(mechanisms: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training runs and histograms."""
    kinds = ([], [])
    for entry in mechanisms:
        kinds[entry["mechanism"] == HISTOGRAM_MECHANISM].append(entry)
    return kinds


def _first_steps(training: list[dict], steps: int) -> list[dict]:
    """The runs after `steps` steps of all of them, one run after the other."""
    taken = []
    for entry in training:
        times = min(entry["times"], steps)
        taken.append(entry | {"times": times})
        steps -= times
    return taken


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
    epsilons = [["relation", "lower", "estimate", "upper", "PLD", "accountant"]]
    deltas, at_epsilon = [["relation", "delta", "epsilon"]], [["relation", "epsilon", "delta"]]
    for name in report["neighbouring_relations"]:
        entry = report["epsilon"][name]
        numbers = [entry[key] for key in ("lower", "estimate", "upper", "pld")]
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
