"""The figures, charts and texts of a report's page. Its words are in the templates."""

import math
import shlex
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from evaluation.page import charts
from evaluation.page.material import (
    Annotations,
    Material,
    Samples,
    Selection,
    Topics,
    histogram_of,
)
from evaluation.page.printing import Verbatim, portable, portable_word
from evaluation.results import LENGTHS, PER_TEXTS, interval, shown
from privacy_checks.composition import curve_by_run
from query_gpt35_for_annotation.job import MAX_TOKENS_NAMES, VENDOR_URL, JobSettings
from utils.command_line.parser import parser_of, to_argv
from utils.command_line.sampling_flags import SamplingSettings
from utils.privacy.guarantee import claim, conditions, exception, name_of_unit, rounded_up
from utils.versions import toolkit_commit

# The section of a tool's results; each other tool has one of its own.
SECTIONS = {
    "distribution": "close", "perplexity": "better", "judge": "better", "memorisation": "leak",
}  # fmt: skip
TRAIN, ANNOTATE = "accelerate launch train.py", "python -m query_gpt35_for_annotation.annotate"
# Names of scores that answer a question, the first one first.
HEADLINES = (
    "MAUVE", "gain on the base model per token (nats)", "win rate", "exact duplicates, share",
    "copies or near copies of any private row, share",
)  # fmt: skip
# Odds before, for which the odds after are given.
PRIORS = (0.5, 0.1, 0.01)
# What fewer texts do not show may be there all the same.
LEAST_TEXTS = 100
# Of the data that `data/prepare_quickstart.py` makes.
QUICKSTART = ("quickstart_instructions", "labelled_quickstart", "labelled_quickstart_synthetic")
# Above it the bound on the odds of the worst case says little by itself.
LARGE_EPSILON = 3
LENGTH_BINS, SHOWN_CHARACTERS = 24, 700
SHOWN_TOPICS = 20  # of the kept ones, and of the lost ones

# A prompt, and the answers to it: (who, answer).
Exchange = tuple[Verbatim, list[tuple[str, Verbatim]]]


class Chart(NamedTuple):
    """An SVG, and the same in words."""

    title: str
    svg: Markup
    words: str


@dataclass(frozen=True)
class Page:
    """What the templates show of the material, all of which may be shown.

    Attributes:
        num_shown: texts of each kind.
        own_command: the words of the command that makes the page.
    """

    material: Material
    num_shown: int
    own_command: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What was made of which data, in words; the quick start's are too small for more."""
        material = self.material
        has_texts = any(not each.prompted for each in material.samples)
        made = "Synthetic instructions" if has_texts else "A model"
        data = {Path(str(run.arguments.get("dataset_name"))).name for run in material.runs}
        remark = " (a demonstration)" if data <= {*QUICKSTART} else ""
        return f"{made} learnt from {material.data_name}{remark}"

    @property
    def released(self) -> str:
        """The runs' names."""
        return " and ".join(portable_word(run.folder) for run in self.material.runs)

    @cached_property
    def origin(self) -> str:
        """When the page was made, and by which commit."""
        today, commit = datetime.now(UTC), toolkit_commit()
        made = f"Made on {today.day} {today:%B %Y}"
        return f"{made} by commit {commit} of the toolkit" if commit else made

    @cached_property
    def sections(self) -> list[str]:
        """Keys of the sections that have something to show, in order."""
        filled = {finding["section"] for finding in self.findings}
        filled |= {"close"} if self.closeness or self.material.topics else set()
        filled |= {"leak"} if self.guarantee else set()
        hidden = any(samples.hidden for samples in self.material.samples)
        filled |= {"texts"} if self.text_sets or self.answers or self.annotated or hidden else set()
        questions = ["close", "better", "leak", "texts", *self.tools]
        found = [key for key in questions if key in filled]
        covered = self.guarantee or self.material.internal
        return ["guarantee", *(found if covered else []), "pipeline", "reproduce"]

    @property
    def cards(self) -> list[str]:
        """Keys of the sections that have an answer in short."""
        answered = {finding["section"] for finding in self.findings} | {"guarantee", "leak"}
        answered |= {"close"} if self.material.selection or self.material.topics else set()
        return [key for key in self.sections if key in answered]

    # -------------------------------------------------------------------- the guarantee

    @cached_property
    def composed(self) -> dict:
        """The composed report, the paths in it portable whatever they hold."""
        return self._portable(self.material.composed)

    def _portable(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._portable(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._portable(each) for each in value]
        if isinstance(value, str):
            for path in [*(run.folder for run in self.material.runs), *self.material.ledgers]:
                value = value.replace(str(path), portable_word(path))
        return value

    @property
    def above_target(self) -> list[str]:
        """Which runs' targets are less than what was spent; none without a guarantee."""
        return self.composed.get("above_target", [])

    @cached_property
    def guarantee(self) -> dict | None:
        """The figures of the guarantee; None without one."""
        material, composed = self.material, self.material.composed
        if not composed["guarantee"]:
            return None
        unit = name_of_unit(composed).replace("example", "row")
        (bounds,) = composed["epsilon"].values()
        (other_deltas,) = composed["epsilon_at_other_deltas"].values()
        epsilon, delta = bounds["upper"], f"{composed['delta']:g}"
        runs = curve_by_run(composed, material.curve)
        # Numbered, since what is portable of two paths may be the same.
        names = [f"{n}. {portable_word(Path(run))}" for n, run in enumerate(runs, start=1)]
        starts = [points[0][0] for points in runs.values() if points]
        boundaries = {step: f"run {n} begins" for n, step in enumerate(starts, start=1) if n > 1}
        curve = {
            "title": "Privacy spent over training, run after run",
            "x_label": "logical steps", "y_label": f"epsilon at delta {delta}", "kind": "marked",
            "boundaries": boundaries,
            "lines": dict(zip(names if len(runs) > 1 else ["epsilon"], runs.values())),
        }  # fmt: skip
        return {
            "epsilon": rounded_up(epsilon),
            "rounded_up": f"{math.ceil(epsilon * 100) / 100:g}",
            "is_large": epsilon > LARGE_EPSILON,
            "delta": delta,
            "claim": claim(composed),
            "conditions": [best_catch(material.catch_rates, unit), *conditions(composed)],
            "accountant": bounds["accountant"],
            "guess": best_guess(material.total_variation),
            "factor": factor(epsilon),
            "odds": odds(epsilon),
            "unit": unit,
            "exception": exception(composed),
            "num_histograms": len(composed["mechanisms"]) - len(material.runs),
            "other_deltas": other_deltas,
            "rows_of_one_person": composed["rows_of_one_person"],
            "curve": line_chart(curve, "epsilon"),
        }

    # -------------------------------------------------------------------- results

    @cached_property
    def tools(self) -> dict[str, str]:
        """The tools that have a section of their own, by its key."""
        names = dict.fromkeys(result["tool"] for result in self.material.results)
        own = [name for name in names if name not in SECTIONS]
        return {f"tool-{number}": name for number, name in enumerate(own)}

    @cached_property
    def findings(self) -> list[dict]:
        """The results, each with its section and charts, and its scores and headline in words."""
        section = SECTIONS | {tool: key for key, tool in self.tools.items()}
        found = []
        for number, result in enumerate(self.material.results):
            scores = [
                score
                | {"interval": spread(score), "reading": reading(score)}
                | {"n_in_words": "not on record" if score["n"] is None else f"{score['n']:,}"}
                for score in result["scores"]
            ]
            own = {
                "section": section[result["tool"]],
                "scores": scores,
                "headline": headline(scores),
                "charts": result_charts(result, number, self.longest_chart == number),
                # A private result has those of the rows, too.
                **personal_data([] if result["private"] else scores),
            }
            found.append(result | own)
        return found

    @cached_property
    def longest_chart(self) -> int | None:
        """The result that shows the lengths of more sets of texts than the page itself can.

        One chart of lengths is enough; None where it is the page's own.
        """
        sets = {
            number: len(chart["lines"])
            for number, result in enumerate(self.material.results)
            for chart in result["charts"]
            if chart["title"] == LENGTHS
        }
        best = max(sets, key=lambda number: sets[number], default=None)
        return best if best is not None and sets[best] > len(self.text_sets) else None

    @cached_property
    def losses(self) -> list[Chart]:
        """The losses of each run, which an internal page alone has."""
        found = []
        for number, run in enumerate(self.material.runs + self.material.synthetic_runs):
            points = {
                name: [(line["step"], line[name]) for line in run.metrics if name in line]
                for name in ("train_loss", "validation_loss")
            }
            chart = {
                "title": f"Losses of {portable_word(run.folder)} (private)",
                "x_label": "logical steps", "y_label": "nats a token", "kind": "line",
                "lines": {name.replace("_", " "): line for name, line in points.items() if line},
            }  # fmt: skip
            found += [line_chart(chart, f"losses-{number}")] if chart["lines"] else []
        return found

    # -------------------------------------------------------------------- texts

    @cached_property
    def text_sets(self) -> dict[str, list[str]]:
        """The sets of texts of the instructions, by what they are called on the page."""
        drawn = [samples for samples in self.material.samples if not samples.prompted]
        sets = {
            f"synthetic, {portable_word(samples.folder)}" if len(drawn) > 1 else "synthetic": [
                each["text"] for each in samples.shown
            ]
            for samples in drawn
        }
        if self.material.selection:
            sets["selected"] = self.material.selection.texts
        sets["real (private)"] = self.material.real
        return {name: texts for name, texts in sets.items() if texts}

    @cached_property
    def closeness(self) -> list[Chart]:
        """Topics asked for and sampled, before and after the selection, and lengths."""
        material = self.material
        topics = material.topics if material.topics and material.topics.kept else None
        found = [asked_chart(topics, self.of_topics)] if topics else []
        found += [topics_chart(material.selection)] if material.selection else []
        own = self.text_sets and self.longest_chart is None
        return found + ([lengths_chart(self.text_sets)] if own else [])

    @cached_property
    def of_topics(self) -> Counter[int]:
        """How many samples each topic of the histogram has that they were drawn by."""
        topics = self.material.topics
        return Counter(
            each["topic"]
            for samples in self.material.samples
            if topics and histogram_of(samples) == topics.sha256
            for each in samples.shown
        )

    @property
    def shown_topics(self) -> list[tuple[str, str, str]]:
        """Keywords of a topic, its noisy count, and its samples or that it is lost."""
        if not (topics := self.material.topics):
            return []
        kept = [(each, f"{self.of_topics[each['topic']]:,}") for each in topics.kept[:SHOWN_TOPICS]]
        lost = [(each, "lost") for each in topics.lost[:SHOWN_TOPICS]]
        return [(each["keywords"], f"{each['count']:,.0f}", drawn) for each, drawn in kept + lost]

    @property
    def lengths(self) -> list[list[str]]:
        """See `lengths_rows`."""
        return lengths_rows(self.text_sets)

    @property
    def columns(self) -> list[tuple[str, list[Verbatim]]]:
        """Some texts of each set."""
        return [
            (name, [cut(text) for text in texts[: self.num_shown]])
            for name, texts in self.text_sets.items()
        ]

    @cached_property
    def answers(self) -> list[Exchange]:
        """Answers of all folders to the same prompts."""
        by_prompt: dict[str, list[tuple[str, Verbatim]]] = {}
        for samples in self.material.samples:
            for sample in samples.shown if samples.prompted else []:
                answer = portable_word(samples.folder), cut(sample["text"])
                by_prompt.setdefault(sample["prompt"], []).append(answer)
        # Prompts that most folders answer come first.
        ranked = sorted(by_prompt.items(), key=lambda item: -len({who for who, _ in item[1]}))
        return [(cut(prompt), answers) for prompt, answers in ranked[: self.num_shown]]

    @cached_property
    def annotated(self) -> list[Exchange]:
        """Synthetic instructions with the answers that annotation got."""
        if not (annotations := self.material.annotations):
            return []
        answered = [record for record in annotations.records if record["answer"]]
        return [
            (cut(record["instruction"]), [(annotations.model, cut(record["answer"]))])
            for record in answered[: self.num_shown]
        ]

    # -------------------------------------------------------------------- what was done

    @property
    def facts(self) -> dict[Path, dict]:
        """What the composed report says of single runs, by their folders."""
        composed = self.material.composed
        runs = composed.get("runs", [composed]) if self.guarantee else []
        return {Path(run["run"]): run for run in runs}

    @property
    def bases(self) -> set[str | None]:
        """Fingerprints of the runs' base models."""
        return {run.base for run in self.material.runs + self.material.synthetic_runs}

    @property
    def commands(self) -> list[str]:
        """What was run, as far as it is on record, and what checks the guarantee."""
        material = self.material
        lines = [command(TRAIN, run.argv[1:]) for run in material.runs]
        for samples in material.samples:
            lines.append(command("accelerate launch inference.py", sampling_argv(samples)))
        stages = (material.topics, material.selection)
        records = [material.extraction, *(stage and stage.report for stage in stages)]
        for words in (words for record in records for words in (record or {}).get("commands", [])):
            lines.append(command("", words))
        if material.annotations:
            lines.append(command(ANNOTATE, annotation_argv(material.annotations)))
        for run in material.synthetic_runs:
            lines.append(command(TRAIN, run.argv[1:]))
        for result in material.results:
            lines.append(command(f"python -m evaluation.{result['tool']}", result["argv"][1:]))
        check = [str(run.folder) for run in material.runs]
        check += ["--histogram", *map(str, material.ledgers)] if material.ledgers else []
        lines.append(command("python -m privacy_checks.report", check))
        lines.append(command("", self.own_command))
        return list(dict.fromkeys(lines))

    @property
    def versions(self) -> list[str]:
        """Each library with all of its versions on record."""
        material = self.material
        sources = [run.versions for run in material.runs + material.synthetic_runs]
        sources += [samples.manifest["versions"] for samples in material.samples]
        sources += [result["versions"] for result in material.results]
        found: dict[str, dict] = {}
        for name, version in (item for source in sources for item in source.items()):
            found.setdefault(str(name), {})[str(version)] = True
        return [portable(f"{name} {' and '.join(found[name])}") for name in sorted(found)]


# ------------------------------------------------------------------------ bounds and readings


def best_guess(total_variation: float | None) -> str:
    """How often the best guess whether a row was in the data is right at most, from even odds.

    A test that tells two distributions apart is right at most (1 + TV) / 2 of the time (Neyman and
    Pearson 1933), and delta at epsilon 0 is the total variation TV, of the worst neighbours.
    """
    if total_variation is None:
        raise ValueError("without a guarantee no guess is bounded")
    return f"{math.ceil((1 + total_variation) / 2 * 1e4) / 100:g}%"


def best_catch(rates: dict[float, float], unit: str) -> str:
    """How many of the units that were in the data an attack finds at most, in a sentence.

    Args:
        rates: see `Material.catch_rates`.
    """
    bounds = [
        f"{math.ceil(rate * 1e4) / 100:g}% at a false-alarm rate of {alarms * 100:g}%"
        for alarms, rate in rates.items()
    ]
    return f"Of the {unit}s that were in the data no attack finds more than {', '.join(bounds)}."


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


def headline(scores: list[dict]) -> dict | None:
    """The score that answers the section's question: a known one, or the first with a control."""

    def rank(score: dict) -> tuple[int, bool]:
        name = score["name"]
        known = HEADLINES.index(name) if name in HEADLINES else len(HEADLINES)
        return known, score["control"] is None

    return min(scores, key=rank, default=None)


def personal_data(scores: list[dict]) -> dict[str, list[str]]:
    """What was found of personal data, with how many there are in 1,000 texts, and what was not."""
    kinds = [score for score in scores if score["name"].endswith(PER_TEXTS)]
    name = {score["name"]: score["name"].removesuffix(PER_TEXTS) for score in kinds}
    return {
        "found": [
            f"{shown(each['value'])} {name[each['name']]}" for each in kinds if each["value"]
        ],
        "not_found": [name[each["name"]] for each in kinds if not each["value"]],
    }


def spread(score: dict) -> str:
    """A score's interval; none of a single example, which is in every draw."""
    alone = score["n"] == 1 and score["low"] == score["high"]
    return "" if alone else interval(score["low"], score["high"])


def reading(score: dict) -> str:
    """A score against its control, as far as its interval tells them apart, and its texts do.

    A figure that is better the lower it is tells of a leak however few texts show it.
    """
    control = score["control"]
    if control is None or score["low"] is None or score["high"] is None:
        return ""
    shows_leak = score["better"] == "lower" and score["low"] > control
    if score["n"] is not None and score["n"] < LEAST_TEXTS and not shows_leak:
        return "too few texts"
    if score["low"] <= control <= score["high"]:
        return "not told apart from the control"
    above = score["value"] > control
    words = {"higher": ("worse", "better"), "lower": ("better", "worse")}
    return words.get(score["better"], ("lower", "higher"))[above] + " than the control"


# ------------------------------------------------------------------------ charts and texts


def result_charts(result: dict, number: int, with_lengths: bool) -> list[Chart]:
    """Scores of one name that have intervals and can be compared, and the result's own charts.

    Args:
        number: of the result on the page.
        with_lengths: whether its chart of lengths is the one that the page shows.
    """
    control, found = portable(result["control"]), []
    scores = [score | {"subject": portable(score["subject"])} for score in result["scores"]]
    for place, given in enumerate(dict.fromkeys(score["name"] for score in scores)):
        same, name = [score for score in scores if score["name"] == given], portable(given)
        marks = len(same) + sum(score["control"] is not None for score in same)
        if marks > 1 and any(score["low"] is not None for score in same):
            svg = Markup(charts.score_chart(name, same, control, f"scores-{number}-{place}"))
            found.append(Chart(name, svg, charts.describe_scores(name, same, control)))
    for place, chart in enumerate(result["charts"]):
        if chart["title"] == LENGTHS and not with_lengths:
            continue
        words = {key: portable(chart[key]) for key in ("title", "x_label", "y_label")}
        lines = {portable(label): points for label, points in chart["lines"].items()}
        found.append(line_chart(chart | words | {"lines": lines}, f"result-{number}-{place}"))
    return found


def line_chart(chart: dict, key: str) -> Chart:
    """A chart of lines with its words."""
    return Chart(chart["title"], Markup(charts.line_chart(chart, key)), charts.describe(chart))


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
        "title": LENGTHS, "x_label": "characters", "y_label": "share of the texts",
        "kind": "step", "lines": lines,
    }  # fmt: skip
    return line_chart(chart, "lengths")


def lengths_rows(sets: dict[str, list[str]]) -> list[list[str]]:
    """Name, number, and the 10%, 50% and 90% quantiles of the lengths of each set."""
    rows = []
    for name, texts in sets.items():
        quantiles = np.quantile([len(text) for text in texts], [0.1, 0.5, 0.9])
        rows.append([name, f"{len(texts):,}", *(f"{value:,.0f}" for value in quantiles)])
    return rows


def asked_chart(topics: Topics, sampled: Counter[int]) -> Chart:
    """Shares of the topics above the noise, the largest first: of private rows, and of samples."""
    label = f"private, noise of deviation {topics.report['noise_multiplier']:g}"
    counts = {label: [each["count"] for each in topics.kept]}
    if sampled:
        counts["sampled"] = [sampled[each["topic"]] for each in topics.kept]
    chart = {
        "title": "Topics of private rows and of samples", "kind": "step",
        "x_label": "topics, the most private rows first", "y_label": "share",
        "lines": {
            name: [(place, each / sum(values)) for place, each in enumerate(values, start=1)]
            for name, values in counts.items()
        },
    }  # fmt: skip
    return line_chart(chart, "topics")


def topics_chart(selection: Selection) -> Chart:
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


def cut(text: str) -> Verbatim:
    """A text for the page, its end left out where it is long."""
    text = text.strip() or "(nothing)"
    is_long = len(text) > SHOWN_CHARACTERS
    return Verbatim(text[:SHOWN_CHARACTERS].rstrip() + " […]" if is_long else text)


def command(program: str, words: list) -> str:
    """A line for a shell, without this machine's paths."""
    return portable(shlex.join([*program.split(), *map(portable_word, words)]))


def annotation_argv(annotations: Annotations) -> list[str]:
    """Flags that answers were asked with; the address of a server of one's own is left out."""
    manifest, parser = annotations.manifest, parser_of(JobSettings, "")
    asked = dict(manifest["decoding"])
    for name in MAX_TOKENS_NAMES[1:]:
        if name in asked:
            asked |= {"max_tokens": asked[name], "max_tokens_parameter": name}
    files = " ".join(manifest.get("inputs_sha256", {}))
    own = [f"--instructions={files}", f"--output={annotations.folder}"]
    given = vars(parser.parse_args(own)) | asked | {"model": manifest["model"]}
    if manifest["base_url"] != VENDOR_URL:
        given["base_url"] = "BASE_URL"
    return to_argv(parser, SimpleNamespace(**given))


def sampling_argv(samples: Samples) -> list[str]:
    """Flags that a folder of samples was drawn with, from its manifest."""
    given = SimpleNamespace(**samples.manifest)
    given.job_sess, given.output_dir = samples.folder.name, str(samples.folder.parent)
    if samples.prompted:
        given.num_samples = None
    return to_argv(parser_of(SamplingSettings, ""), given)
