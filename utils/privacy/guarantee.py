"""What is promised, for whom, and what is not: told once, for every page that tells it.

A report is a dict of facts, of one run (`build_report`) or of several runs and histograms
(`privacy_checks.composition`); `sections` says it to people, and `as_text` and `as_markdown` lay
that out. No torch.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from pathlib import Path

from utils.files import write_atomic, write_json
from utils.privacy.accounting import (
    ADD_REMOVE,
    GROUP_SIZES,
    REPLACE,
    SampledGaussian,
    compute_epsilon,
    epsilon_bounds,
    group_epsilons,
)
from utils.privacy.plan import UNITS, PrivacyPlan

UNIT = "one example: a row of the prepared train split"
NEIGHBOURS = {
    ADD_REMOVE: "adding or removing one example",
    REPLACE: "replacing one example by another",
}
SEVERAL_ROWS = "several rows about one person: the unit is a row"
BOUNDS = ("lower", "estimate", "upper", "pld", "prv", "probability_of_more")
NOTHING_COVERED = "everything: treat the adapter and all its outputs as private data"
COVERED = [
    "the adapter, every checkpoint of it, and whatever is computed from them: merged models, "
    "synthetic instructions, answers",
    "the number of steps, the learning rate and every other value of run_config.json",
]
NOT_PROBED = "not probed"
INEXACT = "what kernels change in a row's gradient with the rows next to it"
NOT_COVERED = [
    "everything under private/: training and validation losses, gradient norms, clip fractions, "
    "realised batch sizes; also when they are shown on a terminal or sent to a tracker",
    "the choice of hyper-parameters over several runs on the same data",
    "data-dependent preparation, such as deduplication: the guarantee is for the prepared set",
    "text that the base model had already seen",
    SEVERAL_ROWS,
    "timing and other side channels of the machine that trains",
    "somebody who can break ChaCha20, of which draws and noise are made: the guarantee is against "
    "all others, whatever they compute",
]


def unit_of(plan: PrivacyPlan) -> str:
    """What one neighbour has and the other has not: "one NAME: ..."."""
    if plan.unit_column is None:
        return UNIT
    used = (
        f"{plan.max_rows_per_unit} of them, drawn afresh, used in a step"
        if plan.unit_sampling == UNITS
        else f"{plan.max_rows_per_unit} of them used"
    )
    return f"{person(plan.unit_column, plan.owner)}, at most {used}"


def person(unit_column: str, owner: str | None) -> str:
    """The unit where a column says whose a row is, however many rows that are."""
    counts = f", of which the {owner} counts" if owner else ""
    return f"one person: all rows of the train split with the same value of {unit_column}{counts}"


def not_covered_of(unit_column: str | None, numerics: str) -> list[str]:
    """What is not covered where the unit is a row or a person.

    Args:
        numerics: what probes found, parted by "; ".
    """
    exact = all(found.startswith("exact") for found in numerics.split("; "))
    return for_unit(NOT_COVERED, unit_column) + ([] if exact else [INEXACT])


def for_unit(not_covered: list[str], unit_column: str | None) -> list[str]:
    """What is not covered, as it reads where the unit is a row or a person."""
    if unit_column is None:
        return not_covered
    whose = (
        f"who is meant by a row but is not its {unit_column}, and whoever has several: a "
        f"person is what {unit_column} tells apart"
    )
    return [whose if each == SEVERAL_ROWS else each for each in not_covered]


def rows_of_one_person(
    plan: PrivacyPlan, events: Sequence[SampledGaussian], delta: float
) -> list[dict]:
    """Epsilon for several rows of one person; empty where the unit is the person.

    Args:
        events: all that was done with the data, for which the rows come or go together.

    Returns:
        One {"rows", "epsilon"} a number of rows; upper bounds at `delta`.
    """
    if plan.unit_column is not None:
        return []
    bounds = group_epsilons(events, delta, GROUP_SIZES, plan.bands > 1)
    return [{"rows": rows, "epsilon": epsilon} for rows, epsilon in bounds.items()]


def build_report(
    plan: PrivacyPlan | None,
    *,
    steps_taken: int = 0,
    steps_recorded: int = 0,
    participations: int | None = None,
    ledger_head: dict | None = None,
    insecure: bool = False,
    numerics: str = NOT_PROBED,
) -> dict:
    """The privacy report of a run.

    Args:
        plan: None for a run without privacy.
        steps_taken: logical steps in the released model.
        steps_recorded: steps in the ledger, all of which epsilon counts; those beyond `steps_taken`
            were noised and then lost in a crash, perhaps after a checkpoint with them was shared.
        participations: in how many of the steps in the ledger one unit may have taken part; in all
            if None.
        insecure: noise came from a known seed.
        numerics: how far an example's gradient was its own: begins with "exact" where it was.

    Returns:
        A JSON-able dict; every epsilon is None where there is no guarantee.
    """
    if plan is None:
        return {
            "guarantee": False,
            "why": "trained without differential privacy",
            "epsilon": dict.fromkeys(("target", *BOUNDS)),
            "covered": [],
            "not_covered": [NOTHING_COVERED],
        }
    lost = steps_recorded - steps_taken
    times = steps_recorded if participations is None else participations
    events = plan.events(times)
    drawn = "person" if plan.unit_sampling == UNITS else "example"
    return {
        "guarantee": not insecure,
        "why": "noise and sampling came from a known seed (a test)" if insecure else "",
        "unit": unit_of(plan),
        "unit_column": plan.unit_column,
        "max_rows_per_unit": plan.max_rows_per_unit,
        "unit_sampling": plan.unit_sampling,
        "neighbouring_relation": plan.neighbouring_relation,
        "num_examples": plan.num_examples,
        "sampling_rate": plan.sampling_rate,
        "expected_batch_size": plan.expected_batch_size,
        "steps_planned": plan.steps,
        "steps_taken": steps_taken,
        "steps_lost": lost,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "clip_function": plan.clip_function,
        "loss_normalization": plan.loss_normalization,
        "delta": plan.delta,
        "epsilon": _epsilons(plan, times, insecure),
        "epsilon_without_lost_steps": (
            _epsilons(plan, plan.participations(range(steps_taken)), insecure) if lost else None
        ),
        "rows_of_one_person": [] if insecure else rows_of_one_person(plan, events, plan.delta),
        "reserved_histogram_sigma": plan.reserved_histogram_sigma,
        "sampler": f"Poisson: every {drawn} independently with probability batch size / N",
        "noise_source": (
            "INSECURE: a fixed seed"
            if insecure
            else "ChaCha20 keyed from the operating system's entropy at every process start"
        ),
        "covered": [] if insecure else COVERED,
        "numerics": numerics,
        "not_covered": not_covered_of(plan.unit_column, numerics),
        "plan_hash": plan.digest(),
        "ledger": ledger_head,
    } | (_of_bands(plan, drawn, times) if plan.bands > 1 else {})


def _of_bands(plan: PrivacyPlan, drawn: str, times: int) -> dict:
    """What a report says of correlated noise, enough to account for it anew."""
    bands = plan.bands
    return {
        "bands": bands,
        "band_coefficients": plan.band_coefficients,
        "participations": times,
        "sampler": (
            f"Poisson: every {drawn} of one group in turn of {bands}, independently with "
            f"probability {bands} x batch size / N"
        ),
    }


def _epsilons(plan: PrivacyPlan, times: int, insecure: bool) -> dict:
    if insecure:
        return {"target": plan.target_epsilon} | dict.fromkeys((*BOUNDS, "with_reserved_histogram"))
    events = plan.events(times)
    return {
        "target": plan.target_epsilon,
        **asdict(epsilon_bounds(events, plan.delta)),
        "with_reserved_histogram": (
            compute_epsilon(events + plan.reserved, plan.delta).upper if plan.reserved else None
        ),
    }


# ------------------------------------------------------------------------ how it is told


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        table: rows of cells, the first of them the header.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    items: list[str] = field(default_factory=list)


def sections(report: dict) -> list[Section]:
    """A report as its reader sees it: the promise, its figures, what it covers and what not."""
    lists = [
        Section("Covered", items=report["covered"] or ["nothing"]),
        Section("Not covered", items=report["not_covered"]),
    ]
    if not report["guarantee"]:
        subject = report.get("run", "this run")
        verdict = f"There is NO PRIVACY GUARANTEE for {subject}: {report['why']}."
        return [Section("Privacy report", [verdict]), *lists]
    figures = _composed_figures(report) if "mechanisms" in report else _own_figures(report)
    several = [_several_rows(report)] if report["rows_of_one_person"] else []
    paragraphs = [*report.get("above_target", []), *promise(report)]
    return [Section("Privacy report", paragraphs), *several, *figures, *lists]


def promise(report: dict) -> list[str]:
    """The guarantee and its conditions in sentences."""
    runs = report.get("runs", [report])
    subject = report.get("run", "The released model")
    if num_histograms := len(report.get("mechanisms", runs)) - len(runs):
        subject += f" with {num_histograms} histogram(s)"
    several_relations = len(relations_of(report)) > 1
    verb = "is" if len(runs) == 1 else "are together"
    lines = [
        f"{subject} {verb} {claim(report, relation)} ({relation})."
        for relation in relations_of(report)
    ]
    lines += [
        f"Whatever somebody believed before, the odds that the {name_of_unit(report)} was in the "
        "data change by a factor of at most e^epsilon, "
        f"{exception(report, relation)}{f' ({relation})' if several_relations else ''}."
        for relation in relations_of(report)
    ]
    lines += [
        f"{of}Numerics: {numerics}."
        for numerics, of in _of_runs(runs, "numerics").items()
        if numerics
    ]
    return lines + conditions(report)


def name_of_unit(report: dict) -> str:
    """What a neighbour has one more or less of: an example, or a person."""
    return report["unit"].partition(":")[0].removeprefix("one ")


def _of_runs(runs: Sequence[dict], name: str) -> dict:
    """The values that runs have of a fact, each with the runs that it is true of, if not of all."""
    holders: dict = {}
    for run in runs:
        holders.setdefault(run.get(name), []).append(run)
    return {
        value: "" if len(of) == len(runs) else " and ".join(run["run"] for run in of) + ": "
        for value, of in holders.items()
    }


def conditions(report: dict) -> list[str]:
    """What the promise holds under, and what of the plan was not done, or done and lost."""
    runs = report.get("runs", [report])
    clip_norms = listed([run["clip_norm"] for run in runs])
    counted = {True: " persons", False: ""}
    if len({run.get("unit_sampling") == UNITS for run in runs}) > 1:
        counted[False] = " rows"
    sizes = dict.fromkeys(
        f"{run['num_examples']}{counted[run.get('unit_sampling') == UNITS]}" for run in runs
    )
    lines = [
        f"N = {' and '.join(sizes)}, the sampling rate, the number of steps and the clip norm "
        f"{clip_norms} are public constants. N is the published size: with one "
        f"{name_of_unit(report)} more or less, sampling rate and divisor stay as they are."
    ]
    lines += [
        f"{of}{canaries:,} of N are canaries: made-up rows that are nobody's, put in to measure "
        "what is memorised."
        for canaries, of in _of_runs(runs, "canaries").items()
        if canaries
    ]
    lines += [
        f"{of}Noise of {bands} bands is correlated over steps, so that it partly cancels in their "
        f"sum: what the {name_of_unit(report)} holds decides which of {bands} groups it is in, "
        f"steps draw from one group after another, and epsilon counts one step in {bands}, at "
        f"{bands} times the sampling rate."
        for bands, of in _of_runs(runs, "bands").items()
        if bands not in (None, 1)
    ]
    if "runs" in report:
        lines.append(
            "The runs are composed as if each read the same rows; where they read different ones, "
            "this is an upper bound."
        )
    if unfinished := report["steps_planned"] - report["steps_taken"]:
        lines.append(f"{unfinished} of {report['steps_planned']} planned steps are not taken.")
    if report["steps_lost"]:
        without = _by_relation(report, "epsilon_without_lost_steps")
        lines.append(
            f"{report['steps_lost']:,} further steps were noised and then lost in a crash; they "
            "are in no released model. Epsilon counts them, since a checkpoint with them may have "
            "been shared; if nobody saw one, it is "
            + " and ".join(
                rounded_up(bounds["upper"]) + (f" ({relation})" if len(without) > 1 else "")
                for relation, bounds in without.items()
            )
            + "."
        )
    return lines


def exception(report: dict, relation: str | None = None) -> str:
    """With which probability odds change by more than e^epsilon, as the end of a sentence.

    Args:
        relation: the report's first if None.
    """
    bounds = _by_relation(report, "epsilon")[relation or relations_of(report)[0]]
    more = bounds["probability_of_more"]
    if more is None:
        return "except with a probability that is above delta and not known more closely"
    return f"except with probability about {more:.2g}, that of a privacy loss above epsilon"


def rounded_up(bound: float, digits: str = ".3f") -> str:
    """An upper bound as it is printed, which is one still.

    Args:
        digits: how many of them, as `format` takes it.
    """
    with localcontext(Context(rounding=ROUND_CEILING)):
        return format(Decimal(bound), digits)


def claim(report: dict, relation: str | None = None) -> str:
    """(epsilon, delta) and what it is for, as the end of a sentence.

    Args:
        relation: the report's first if None.
    """
    relation = relation or relations_of(report)[0]
    epsilon = _by_relation(report, "epsilon")[relation]["upper"]
    unit = name_of_unit(report)
    return (
        f"({rounded_up(epsilon)}, {report['delta']:g})-differentially private for "
        f"{NEIGHBOURS[relation].replace('example', unit)}, "
        + report["unit"].removeprefix(f"one {unit}: ")
    )


def relations_of(report: dict) -> list[str]:
    """The neighbouring relations of a report, of one run or composed."""
    return report.get("neighbouring_relations") or [report["neighbouring_relation"]]


def listed(numbers: Sequence[float]) -> str:
    """Distinct numbers, for a sentence."""
    return " and ".join(f"{number:.15g}" for number in dict.fromkeys(numbers))


def _by_relation(report: dict, key: str) -> dict[str, dict]:
    relations = relations_of(report)
    return report[key] if "neighbouring_relations" in report else {relations[0]: report[key]}


def _several_rows(report: dict) -> Section:
    people = report["rows_of_one_person"]
    rows = [[f"{each['rows']}", rounded_up(each["epsilon"], ".2f")] for each in people]
    return Section(
        "Several rows of one person",
        [
            f"Epsilon at delta {report['delta']:g} for adding or removing all rows of a person, if "
            "they all push the same way. It grows faster than their number."
        ],
        [["rows", "epsilon"], *rows],
    )


def _own_figures(report: dict) -> list[Section]:
    rows = [(name, value) for name, value in report.items() if _is_scalar(value)]
    rows += [(f"epsilon, {name}", value) for name, value in report["epsilon"].items()]
    table = [["quantity", "value"], *([name.replace("_", " "), f"{v}"] for name, v in rows)]
    return [Section("Figures", table=table)]


def _is_scalar(value: object) -> bool:
    return value not in (None, "") and isinstance(value, str | int | float)


def _composed_figures(report: dict) -> list[Section]:
    composed = [
        ["mechanism", "sampling rate", "noise multiplier", "times"],
        *(
            [entry["mechanism"], f"{entry['sampling_rate']:.6g}",
             f"{entry['noise_multiplier']:g}", f"{entry['times']}"]
            for entry in report["mechanisms"]
        ),
    ]  # fmt: skip
    epsilons = [["relation", "lower", "estimate", "upper", "PLD", "PRV", "accountant"]]
    deltas, at_epsilon = [["relation", "delta", "epsilon"]], [["relation", "epsilon", "delta"]]
    for name in relations_of(report):
        entry = report["epsilon"][name]
        around = [f"{entry[key]:.3f}" for key in ("lower", "estimate")]
        above = [entry[key] for key in ("upper", "pld", "prv")]
        epsilons.append([
            name, *around, *("-" if bound is None else rounded_up(bound) for bound in above),
            entry["accountant"],
        ])  # fmt: skip
        deltas += [
            [name, f"{point['delta']:g}", rounded_up(point["epsilon"])]
            for point in report["epsilon_at_other_deltas"][name]
        ]
        point = report["delta_at_epsilon"][name]
        at_epsilon.append([name, f"{point['epsilon']:g}", rounded_up(point["delta"], ".3g")])
    return [
        Section("Composed in one accountant", table=composed),
        Section(f"Epsilon at delta {report['delta']:g}", table=epsilons),
        Section("Epsilon at other deltas", table=deltas),
        Section("Delta at a given epsilon", table=at_epsilon),
        *([Section("Epsilon over steps", [f"![]({report['plot']})"])] if "plot" in report else []),
        Section("Ledger", items=report["checks"]),
    ]


def render(report: dict, style: Callable[[Section], str]) -> str:
    """The report as a page.

    Args:
        style: `as_text` or `as_markdown`, which lay out one section.
    """
    return "\n".join(style(section) for section in sections(report))


def as_text(section: Section) -> str:
    """A section for a terminal."""
    widths = [max(map(len, column)) for column in zip(*section.table)]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in section.table
    ]
    items = [f"- {item}" for item in section.items]
    return "\n".join([section.title.upper(), *section.paragraphs, *rows, *items, ""])


def as_markdown(section: Section) -> str:
    """A section of a Markdown page."""
    title = section.title
    lines = [f"# {title}" if title == "Privacy report" else f"## {title}", ""]
    for paragraph in section.paragraphs:
        lines += [paragraph, ""]
    rows = ["| " + " | ".join(row) + " |" for row in section.table]
    rows[1:1] = ["|" + "---|" * len(section.table[0])] if section.table else []
    return "\n".join([*lines, *rows, *(f"- {item}" for item in section.items)]).rstrip() + "\n"


def write_report(folder: str | os.PathLike, report: dict) -> None:
    """Write `privacy_report.json` and `.md` into a run's folder."""
    write_json(Path(folder) / "privacy_report.json", report)
    write_atomic(Path(folder) / "privacy_report.md", render(report, as_markdown))
