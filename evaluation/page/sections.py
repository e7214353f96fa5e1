"""The page of a report: facts in sections of paragraphs, tables, charts and texts.

Both templates show the same sections, so that HTML and Markdown say the same.
"""

import argparse
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluation.page import charts
from evaluation.page.material import (
    Annotations,
    Material,
    Samples,
    Selection,
    Training,
    portable,
    portable_word,
)
from evaluation.results import shown
from utils.command_line.parser import make_parser, to_argv
from utils.command_line.sampling_flags import add_sampling_arguments
from utils.privacy.guarantee import UNIT

# Which question a tool's result answers; others have a section of their own.
CLOSE, BETTER, LEAK = ("distribution",), ("perplexity", "judge"), ("memorisation",)
# Odds before, for which the odds after are given.
PRIORS = (0.5, 0.1, 0.01)
# Above it the bound on the odds of the worst case says little by itself.
LARGE_EPSILON = 3
LENGTH_BINS, SHOWN_CHARACTERS = 24, 700


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Lists:
    """Lists side by side, each under its title."""

    lists: list[tuple[str, list[str]]]
    kind: str = "lists"


@dataclass(frozen=True)
class Table:
    """Rows of cells; `numbers` are the columns that hold numbers."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: Sequence[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """An SVG, and the same in words."""

    title: str
    svg: str
    words: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    charts: list[Chart]
    kind: str = "charts"


@dataclass(frozen=True)
class Quotes:
    """Texts side by side: one column of texts a title."""

    columns: list[tuple[str, list[str]]]
    kind: str = "quotes"


@dataclass(frozen=True)
class Answers:
    """Answers to the same prompts: (prompt, [(who, answer)])."""

    title: str
    exchanges: list[tuple[str, list[tuple[str, str]]]]
    kind: str = "answers"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    title: str
    lines: list[str]
    kind: str = "code"


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; `answer` is what the top of the page says of it."""

    key: str
    title: str
    blocks: list
    answer: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """What the templates show.

    Attributes:
        odds: rows of (before, after at most).
    """

    title: str
    internal: bool
    guarantee: bool
    epsilon: str
    delta: str
    verdict: list[str]
    odds: list[tuple[str, str]]
    sections: list[Section]


def build_page(material: Material, num_shown: int) -> Page:
    """Lay out the page.

    Args:
        num_shown: texts of each kind.
    """
    composed = material.composed
    sections = [officer_section(material)]
    if composed["guarantee"] or material.internal:
        sections += [
            close_section(material),
            better_section(material),
            leak_section(material),
            texts_section(material, num_shown),
        ]
        sections += other_sections(material)
    sections += [pipeline_section(material), reproduce_section(material)]
    return Page(
        title=" and ".join(portable_word(run.folder) for run in material.runs),
        internal=material.internal,
        guarantee=composed["guarantee"],
        epsilon=f"{math.ceil(upper(composed) * 100) / 100:g}" if composed["guarantee"] else "",
        delta=f"{composed['delta']:g}" if composed["guarantee"] else "",
        verdict=verdict(material),
        odds=odds(upper(composed)) if composed["guarantee"] else [],
        sections=[section for section in sections if section.blocks],
    )


# ------------------------------------------------------------------------ the guarantee


def upper(composed: dict) -> float:
    """Epsilon of everything together."""
    (bounds,) = composed["epsilon"].values()
    return bounds["upper"]


def guess(material: Material) -> str:
    """How often the best guess whether a row was there is right at most, from even odds.

    A test that tells two distributions apart is right at most (1 + TV) / 2 of the time (Neyman and
    Pearson 1933), and delta at epsilon 0 is the total variation TV, of the worst neighbours.
    """
    return f"{math.ceil((1 + material.total_variation) / 2 * 1e4) / 100:g}%"


def factor(epsilon: float) -> str:
    """exp(epsilon), rounded up."""
    value = math.exp(min(epsilon, 700.0))
    if value < 100:
        return f"{math.ceil(value * 100) / 100:g}"
    return f"{math.ceil(value):,}" if value < 1e7 else f"{value * 1.05:.1e}"


def odds(epsilon: float) -> list[tuple[str, str]]:
    """Probability before and at most after, when the odds grow by exp(epsilon)."""
    rows = []
    for prior in PRIORS:
        # p e^eps / (p e^eps + 1 - p), without overflow.
        after = prior / (prior + (1 - prior) * math.exp(-epsilon))
        rows.append((f"{prior:.0%}", f"{math.ceil(after * 1e4) / 100:g}%"))
    return rows


def verdict(material: Material) -> list[str]:
    """What holds, in plain words."""
    composed = material.composed
    if not composed["guarantee"]:
        return [
            f"{portable_word(composed['run'])}: {composed['why']}.",
            "Whatever was made from it may give away the rows that it was trained on. Treat the "
            "adapter, its texts and every figure about them as private data.",
        ]
    unit = UNIT.removeprefix("one example: ")
    lines = [
        f"What is released of {' and '.join(portable_word(run.folder) for run in material.runs)} "
        f"is ({upper(composed):.3f}, {composed['delta']:g})-differentially private for adding or "
        f"removing one example, {unit}.",
        "Take anybody's row. Whoever sees all that is released, knows every other row, has "
        "unlimited computers, and guesses whether that row was among the training data, is right "
        f"at most {guess(material)} of the time. A coin is right 50% of the time.",
        "Whatever they believed before, the odds that the row was there change by a factor of at "
        f"most exp(epsilon) = {factor(upper(composed))}, but for a chance of about delta.",
    ]
    if upper(composed) > LARGE_EPSILON:
        lines.append(
            "These are bounds for the worst row and for an attacker who knows all the others. At "
            "an epsilon this large they say little by themselves; measured attacks say more."
        )
    return lines


def officer_section(material: Material) -> Section:
    """What is promised, for whom, and what is not."""
    composed = material.composed
    title = "What may I tell my privacy officer?"
    if not composed["guarantee"]:
        blocks = [Lists([("Not covered", composed["not_covered"])])]
        return Section("guarantee", title, blocks, ["That there is no guarantee."])
    runs = composed.get("runs", [composed])
    histograms = len(composed["mechanisms"]) - len(runs)
    spent = f"{count(len(runs), 'training run')} and {count(histograms, 'histogram')}"
    claims = [
        f"{portable_word(run.folder)} was trained without differential privacy on synthetic data "
        "alone, so it adds nothing to epsilon: a claim of whoever made this page"
        for run in material.synthetic_runs
    ]
    blocks = [
        Text(
            f"{spent} on the private rows were composed in one accountant "
            f"({next(iter(composed['epsilon'].values()))['accountant']}). Every example was taken "
            "into each step independently at random (Poisson sampling); each example's gradient "
            "was clipped, and Gaussian noise from a cryptographic generator was added. Every step "
            "is on record in a hash-chained ledger, which was checked for this page."
        ),
        Lists(
            [
                ("Covered", [clean_paths(item, material) for item in composed["covered"]] + claims),
                ("Not covered", [clean_paths(item, material) for item in composed["not_covered"]]),
            ]
        ),
        Table(
            "Composed in one accountant",
            ["mechanism", "sampling rate", "noise multiplier", "times"],
            [
                [
                    clean_paths(entry["mechanism"], material),
                    f"{entry['sampling_rate']:.4g}",
                    f"{entry['noise_multiplier']:g}",
                    f"{entry['times']:,}",
                ]
                for entry in composed["mechanisms"]
            ],
            numbers=(1, 2, 3),
        ),
        Charts([epsilon_chart(material)]),
        Table(
            "The same guarantee at other deltas",
            ["delta", "epsilon"],
            [
                [f"{point['delta']:g}", f"{point['epsilon']:.3f}"]
                for points in composed["epsilon_at_other_deltas"].values()
                for point in points
            ],
            numbers=(0, 1),
        ),
        Lists([("Checked", [clean_paths(item, material) for item in composed["checks"]])]),
    ]
    if composed["steps_lost"]:
        seen = next(iter(composed["epsilon_if_lost_steps_were_seen"].values()))["upper"]
        lost = (
            f"{composed['steps_lost']:,} further steps were noised and then lost in a crash; they "
            f"are in no released model. If somebody had watched them, epsilon would be {seen:.3f}."
        )
        blocks.insert(1, Text(lost))
    if len(runs) > 1:
        same = "The runs are composed as if each read the same rows: an upper bound if they do not."
        blocks.insert(1, Text(same))
    told = f"({upper(composed):.3f}, {composed['delta']:g})-differential privacy for every row."
    best = f"The best guess about a row is right at most {guess(material)} of the time."
    return Section("guarantee", title, blocks, [told, best])


def epsilon_chart(material: Material) -> Chart:
    """Epsilon over the steps of training."""
    composed = material.composed
    points = [(point["step"], point["epsilon"]) for point in material.curve]
    title = "Privacy spent over training"
    label = f"epsilon at delta {composed['delta']:g}"
    chart = {"title": title, "x_label": "logical steps", "y_label": label, "kind": "line"}
    return line_chart(chart | {"lines": {"epsilon": points}}, "epsilon")


def clean_paths(text: str, material: Material) -> str:
    """A sentence of the composed report, its paths fit for the page whatever they hold."""
    for path in [*(run.folder for run in material.runs), *material.ledgers]:
        text = text.replace(str(path), portable_word(path))
    return portable(text)


# ------------------------------------------------------------------------ the questions


def close_section(material: Material) -> Section:
    """How close the synthetic texts are to the private ones."""
    blocks, answer = results_blocks(material, CLOSE)
    if selection := material.selection:
        distance = selection.report["total_variation_to_private"]
        told = (
            f"Selection by the noisy histogram brought the total variation to it from "
            f"{distance['synthetic']:.3f} to {distance['selected']:.3f} (0: equal, 1: disjoint)."
        )
        answer.insert(0, told)
        blocks.append(Text(told))
    sets = text_sets(material)
    figures = [selection_chart(selection)] if selection else []
    figures += [lengths_chart(sets)] if sets else []
    blocks += [Charts(figures)] if figures else []
    blocks += [lengths_table(sets)] if sets else []
    return Section(
        "close",
        "How close is the synthetic set to the private one?",
        blocks,
        answer or unknown(material, "evaluation.distribution"),
    )


def better_section(material: Material) -> Section:
    """Whether tuning helped."""
    blocks, answer = results_blocks(material, BETTER)
    losses = []
    for number, run in enumerate(material.runs + material.synthetic_runs):
        lines = {
            name.replace("_", " "): [
                (line["step"], line[name]) for line in run.metrics if name in line
            ]
            for name in ("train_loss", "validation_loss")
        }
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            chart = {
                "title": f"Losses of {portable_word(run.folder)} (private)",
                "x_label": "logical steps", "y_label": "nats a token", "kind": "line",
                "lines": lines,
            }  # fmt: skip
            losses.append(line_chart(chart, f"losses-{number}"))
    blocks += [Charts(losses)] if losses else []
    answer = answer or unknown(material, "evaluation.perplexity and evaluation.judge")
    return Section(
        "better", "Is the tuned model better?", blocks or [Text(line) for line in answer], answer
    )


def leak_section(material: Material) -> Section:
    """Whether anything leaked."""
    blocks, answer = results_blocks(material, LEAK)
    if material.composed["guarantee"]:
        bound = (
            "Whatever the attack, the guarantee bounds it: no guess about a row is right more than "
            f"{guess(material)} of the time."
        )
        blocks.insert(0, Text(bound))
        answer.append(bound)
    return Section(
        "leak", "Did anything leak?", blocks, answer or unknown(material, "evaluation.memorisation")
    )


def unknown(material: Material, tools: str) -> list[str]:
    """What the page says where it has nothing to say."""
    if material.internal:
        return [f"Not measured here: {tools} would tell."]
    return [
        f"No figure that may be released is here. What {tools} computes from private data is in "
        "the internal report alone."
    ]


def other_sections(material: Material) -> list[Section]:
    """Results of tools that the questions above do not know."""
    known = {*CLOSE, *BETTER, *LEAK}
    tools = dict.fromkeys(r["tool"] for r in material.results if r["tool"] not in known)
    return [
        Section(
            f"tool-{number}",
            f"Also measured: {portable(tool)}",
            results_blocks(material, (tool,))[0],
        )
        for number, tool in enumerate(tools)
    ]


def results_blocks(material: Material, tools: tuple[str, ...]) -> tuple[list, list[str]]:
    """The results of some tools, and of each a sentence on its first figure with a control."""
    blocks, answer = [], []
    for number, result in enumerate(material.results):
        if result["tool"] not in tools:
            continue
        mark = " (private)" if result["private"] else ""
        control = portable(result["control"])
        scores = [
            score | {"name": portable(score["name"]), "subject": portable(score["subject"])}
            for score in result["scores"]
        ]
        title = portable(result["title"]) + mark
        blocks.append(scores_table(title, scores, control))
        meaning = [f"Intervals: {portable(result['interval'])}."]
        if control:
            meaning.append(f"Control, a diamond in the charts: {control}.")
        blocks.append(Text(" ".join([*meaning, *map(portable, result["notes"])])))
        figures = []
        for place, name in enumerate(dict.fromkeys(score["name"] for score in scores)):
            same = [score for score in scores if score["name"] == name]
            marks = len(same) + sum(score["control"] is not None for score in same)
            if marks > 1 and any(score["low"] is not None for score in same):
                key = f"scores-{number}-{place}"
                svg = charts.score_chart(name, same, control, key)
                figures.append(Chart(name, svg, charts.describe_scores(name, same, control)))
        for place, chart in enumerate(result["charts"]):
            lines = {portable(label): points for label, points in chart["lines"].items()}
            words = {key: portable(chart[key]) for key in ("title", "x_label", "y_label")}
            figures.append(line_chart(chart | words | {"lines": lines}, f"result-{number}-{place}"))
        blocks += [Charts(figures)] if figures else []
        if scores:
            compared = [score for score in scores if score["control"] is not None]
            answer.append(headline((compared or scores)[0]) + mark + ".")
    return blocks, answer


def scores_table(title: str, scores: list[dict], control: str) -> Table:
    """Scores with their intervals and controls, and what that comes to."""
    header = ["measure", "of", "value", "interval"] + (["control", "reads"] if control else [])
    rows = []
    for score in scores:
        row = [score["name"], score["subject"], shown(score["value"]), interval(score)]
        if control:
            against = score["control"]
            row += ["" if against is None else shown(against), reading(score)]
        rows.append(row)
    return Table(title, header, rows, numbers=(2, 3, 4))


def interval(score: dict) -> str:
    """Low to high, where there is an interval."""
    if score["low"] is None or score["high"] is None:
        return ""
    return f"{shown(score['low'])} to {shown(score['high'])}"


def reading(score: dict) -> str:
    """A score against its control, as far as its interval tells them apart."""
    control = score["control"]
    if control is None or not interval(score):
        return ""
    if score["low"] <= control <= score["high"]:
        return "not told apart from the control"
    above = score["value"] > control
    words = {"higher": ("worse", "better"), "lower": ("better", "worse")}
    return words.get(score["better"], ("lower", "higher"))[above] + " than the control"


def headline(score: dict) -> str:
    """A score in a line."""
    parts = [f"{score['name']}, {score['subject']}: {shown(score['value'])}"]
    if interval(score):
        parts.append(f"({interval(score)})")
    if score["control"] is not None:
        parts.append(f"with {shown(score['control'])} for the control")
    if reading(score):
        parts.append(f"— {reading(score)}")
    return " ".join(parts)


# ------------------------------------------------------------------------ texts


def text_sets(material: Material) -> dict[str, list[str]]:
    """The sets of texts of the instructions, by what they are called on the page."""
    sets = {
        f"synthetic, {portable_word(samples.folder)}": [s["text"] for s in samples.shown]
        for samples in material.samples
        if not samples.prompted
    }
    if material.selection:
        sets["selected"] = material.selection.texts
    if material.real:
        sets["real (private)"] = material.real
    return {name: texts for name, texts in sets.items() if texts}


def lengths_chart(sets: dict[str, list[str]]) -> Chart:
    """Shares of texts by length; the last bin holds all that are longer."""
    lengths = {name: np.array([len(text) for text in texts]) for name, texts in sets.items()}
    longest = max(1.0, *(float(np.quantile(each, 0.98)) for each in lengths.values()))
    edges = np.linspace(0, longest, LENGTH_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = {}
    for name, each in lengths.items():
        shares = np.histogram(np.minimum(each, longest), edges)[0] / len(each)
        lines[name] = list(zip(middles.tolist(), shares.tolist()))
    chart = {
        "title": "Lengths of the texts", "x_label": "characters", "y_label": "share of the texts",
        "kind": "step", "lines": lines,
    }  # fmt: skip
    return line_chart(chart, "lengths")


def lengths_table(sets: dict[str, list[str]]) -> Table:
    """Numbers and quantiles of the lengths."""
    rows = []
    for name, texts in sets.items():
        quantiles = np.quantile([len(text) for text in texts], [0.1, 0.5, 0.9])
        rows.append([name, f"{len(texts):,}", *(f"{value:,.0f}" for value in quantiles)])
    header = ["texts", "number", "10% are at most", "half", "90%"]
    return Table("Lengths in characters", header, rows, numbers=(1, 2, 3, 4))


def selection_chart(selection: Selection) -> Chart:
    """The histograms before and after the selection, over bins sorted by the private one."""
    names = {
        "synthetic": "before: all synthetic",
        "selected": "after: selected",
        "private": f"private, noise of deviation {selection.report['noise_multiplier']:g}",
    }
    order = np.argsort([-value for value in selection.histograms["private"]], kind="stable")
    lines = {}
    for name, label in names.items():
        values = np.array(selection.histograms[name])
        shares = (values / max(values.sum(), 1e-300))[order].tolist()
        lines[label] = list(enumerate(shares, start=1))
    chart = {
        "title": "Topics before and after the selection",
        "x_label": "bins, the most private rows first", "y_label": "share of rows", "kind": "step",
        "lines": lines,
    }  # fmt: skip
    return line_chart(chart, "histograms")


def line_chart(chart: dict, key: str) -> Chart:
    """A chart of lines with its words."""
    return Chart(chart["title"], charts.line_chart(chart, key), charts.describe(chart))


def texts_section(material: Material, num_shown: int) -> Section:
    """Texts side by side."""
    columns = [
        (name, [cut(text) for text in texts[:num_shown]])
        for name, texts in text_sets(material).items()
    ]
    blocks: list = [Quotes(columns)] if columns else []
    prompted = [samples for samples in material.samples if samples.prompted]
    blocks += answers_blocks(prompted, num_shown)
    for samples in prompted:
        if samples.hidden:
            blocks.append(
                Text(
                    f"{samples.hidden:,} answers in {portable_word(samples.folder)} are not shown, "
                    "since their prompts are not among the synthetic texts and may be private rows."
                )
            )
    if material.annotations:
        answered = [record for record in material.annotations.records if record["answer"]]
        exchanges = [
            (cut(record["instruction"]), [(material.annotations.model, cut(record["answer"]))])
            for record in answered[:num_shown]
        ]
        if exchanges:
            blocks.append(Answers("Annotated synthetic instructions", exchanges))
    return Section("texts", "What the texts look like", blocks)


def answers_blocks(prompted: list[Samples], num_shown: int) -> list[Answers]:
    """Answers of all folders to the same prompts, side by side."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for samples in prompted:
        who = portable_word(samples.folder)
        for sample in samples.shown:
            by_prompt.setdefault(sample["prompt"], []).append((who, cut(sample["text"])))
    # Prompts that most folders answer come first.
    ranked = sorted(by_prompt.items(), key=lambda item: -len({who for who, _ in item[1]}))
    exchanges = [(cut(prompt), answers) for prompt, answers in ranked[:num_shown]]
    return [Answers("Answers to the same prompts", exchanges)] if exchanges else []


def cut(text: str) -> str:
    """A text for the page, its end left out where it is long."""
    text = text.strip() or "(nothing)"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " […]"


# ------------------------------------------------------------------------ what was done


def pipeline_section(material: Material) -> Section:
    """The stages with their sizes."""
    composed = material.composed
    facts = {run["run"]: run for run in composed.get("runs", [composed])}
    rows = [
        [
            "train with DP" if run.arguments["eps"] != -1 else "train without DP",
            training(run, facts.get(str(run.folder))),
        ]
        for run in material.runs
    ]
    rows += [["train on synthetic data", training(run, None)] for run in material.synthetic_runs]
    bases = {run.base for run in material.runs + material.synthetic_runs}
    rows += [["sample", sampling(samples, bases)] for samples in material.samples]
    if extraction := material.extraction:
        dropped = ", ".join(
            f"{number:,} {reason}" for reason, number in extraction["dropped"].items()
        )
        rows.append(
            ["extract", f"{extraction['kept']:,} distinct instructions kept; dropped: {dropped}"]
        )
    if material.selection:
        rows.append(["select", selecting(material.selection)])
    if material.annotations:
        rows.append(["annotate", annotating(material.annotations)])
    blocks: list = [Table("Stages", ["stage", "what was done"], rows)]
    if material.internal and any(run.metrics for run in material.runs):
        blocks.append(
            Text(
                "Seconds are those of the training steps on record under private/: they follow "
                "from who was sampled, so no guarantee covers them."
            )
        )
    return Section("pipeline", "What was done", blocks)


def training(run: Training, facts: dict | None) -> str:
    """A training run in a sentence."""
    arguments = run.arguments
    parts = [
        f"{portable_word(run.folder)}: {portable_word(arguments.get('model_name'))}, prompt style "
        f"{arguments.get('prompt_style')}, LoRA rank {arguments.get('lora_r')}, learning rate "
        f"{arguments.get('lr')}"
    ]
    if facts and "num_examples" in facts:
        parts.append(
            f"{facts['num_examples']:,} rows, expected batch {arguments.get('total_bs')}, "
            f"{facts['steps_taken']:,} of {facts['steps_planned']:,} steps, clip norm "
            f"{facts['clip_norm']:g}"
        )
    else:
        parts.append(f"batch {arguments.get('total_bs')}, {arguments.get('num_epochs')} epochs")
    if run.own_cost:
        parts.append("epsilon {:.3f} at delta {:g} alone".format(*run.own_cost))
    if seconds := sum(line.get("seconds", 0) for line in run.metrics):
        parts.append(f"{seconds:,.0f} s in its steps (private)")
    return "; ".join(parts)


def sampling(samples: Samples, bases: set[str | None]) -> str:
    """A folder of samples in a sentence; `bases` are the fingerprints of the runs' base models."""
    manifest = samples.manifest
    source = portable_word(manifest.get("adapter_path") or manifest["model_name"])
    if not manifest.get("adapter_path"):
        source += " alone"
        if manifest.get("model_fingerprint") not in bases:
            source += " (that it read no private rows is a claim of whoever made this page)"
    text = f"{portable_word(samples.folder)}: from {source}; {manifest['num_samples']:,} asked for"
    ends = Counter(sample["finish_reason"] for sample in samples.shown)
    if ends:
        tokens = sum(sample.get("num_tokens", 0) for sample in samples.shown)
        ended = ", ".join(f"{number:,} {reason}" for reason, number in ends.most_common())
        text += f", {len(samples.shown):,} drawn ({ended}), {tokens:,} tokens"
    # How long answers to private prompts took follows from those.
    if samples.manifest.get("seconds") and not samples.hidden:
        text += f" in {samples.manifest['seconds']:,.0f} s"
    if samples.hidden:
        text += f"; {samples.hidden:,} with prompts that may be private left out"
    return text


def selecting(selection: Selection) -> str:
    """A selection in a sentence."""
    told, report = selection.report["selection"], selection.report
    return (
        f"{portable_word(selection.folder)}: {told['num_samples']:,} rows "
        f"({told['distinct_rows']:,} distinct) of {told['pool']:,} over "
        f"{report.get('num_bins', len(selection.histograms['private'])):,} bins, noise of "
        f"deviation {report['noise_multiplier']:g}; {told['overflow']:,} stand in for rows that "
        "their bin did not have"
    )


def annotating(annotations: Annotations) -> str:
    """An annotation job in a sentence, with what it cost."""
    records = annotations.records
    ends = Counter(record["status"] for record in records)
    ended = ", ".join(f"{number:,} {status}" for status, number in ends.most_common())
    usages = [record["usage"] for record in records if record.get("usage")]
    tokens = [sum(usage[f"{side}_tokens"] for usage in usages) for side in ("prompt", "completion")]
    cost = "no list price for this model"
    if annotations.usd is not None:
        cost = f"${annotations.usd:.4f}; {annotations.about_price}"
    return (
        f"{portable_word(annotations.folder)}: {portable_word(annotations.model)} was asked "
        f"{len(records):,} instructions: {ended or 'none answered'}; {tokens[0]:,} prompt and "
        f"{tokens[1]:,} answer tokens; {cost}"
    )


def reproduce_section(material: Material) -> Section:
    """Commands and versions."""
    runs = material.runs + material.synthetic_runs
    lines = [command("accelerate launch train.py", run.argv[1:]) for run in runs]
    lines += [command("accelerate launch inference.py", sampling_argv(s)) for s in material.samples]
    for result in material.results:
        lines.append(command(f"python -m evaluation.{result['tool']}", result["argv"][1:]))
    check = [str(run.folder) for run in material.runs]
    check += ["--histogram", *map(str, material.ledgers)] if material.ledgers else []
    lines.append(command("python -m privacy_checks.report", check))
    sources = [run.versions for run in runs]
    sources += [samples.manifest["versions"] for samples in material.samples]
    sources += [result["versions"] for result in material.results]
    found: dict[str, dict] = {}
    for name, version in (item for source in sources for item in source.items()):
        found.setdefault(str(name), {})[str(version)] = True
    versions = [portable(f"{name} {' and '.join(found[name])}") for name in sorted(found)]
    return Section(
        "reproduce",
        "How to do it again",
        [
            Code("Commands on record", list(dict.fromkeys(lines))),
            Text(f"Versions on record: {', '.join(versions)}."),
        ],
    )


def command(program: str, words: list) -> str:
    """A line for a shell, without this machine's paths."""
    return portable(shlex.join([*program.split(), *map(portable_word, words)]))


def sampling_argv(samples: Samples) -> list[str]:
    """Flags that a folder of samples was drawn with, from its manifest."""
    parser = make_parser("")
    add_sampling_arguments(parser)
    given = argparse.Namespace(**samples.manifest)
    given.job_sess, given.output_dir = samples.folder.name, str(samples.folder.parent)
    if samples.prompted:
        given.num_samples = None
    return to_argv(parser, given)


def count(number: int, what: str) -> str:
    """A number of things in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"
