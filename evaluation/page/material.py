"""What the folders of a pipeline hold, and which of it may be shown to whom.

A page for release is made of what the composed guarantee covers: ledgers, flags, texts of adapters
that were trained here, the noisy histogram. Nothing under a private/ folder is opened for it, and
no text is shown that may be a private row: synthetic texts have to lead back to a run by the hashes
of files, and prompts and annotated instructions have to be synthetic themselves. Of a folder with
one prompt that is not, nothing is shown: which prompts are, or how many, would tell of the others.
Wall times of training are left out too, since they follow from who was sampled.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluation.page.chain import ANNOTATIONS, EXTRACTION, SAMPLES, SELECTION, Link, require_chain
from evaluation.results import Chart, Score, read_results
from privacy_checks.composition import composed_report, epsilon_over_steps, events_of
from query_gpt35_for_annotation.job import Job, answers_file, read_records
from query_gpt35_for_annotation.spending import Spending, price_of
from resample_with_dp_histogram.extract import INSTRUCTIONS_FILE, SELECTED_FILE
from topics.folder import HISTOGRAM_FILE
from utils.cli import UsageError
from utils.command_line.parser import flag, positive_float
from utils.command_line.sampling_flags import ADAPTER_WEIGHTS
from utils.files import read_jsonl, sha256_of
from utils.folders import PREPARATION_FILE
from utils.privacy.accounting import ADD_REMOVE, catch_rates, compute_delta
from utils.privacy.ledger import read_ledger
from utils.runs.run_folder import CONFIG_FILE, holds_run
from utils.sampling.shards import read_samples, shards_of
from utils.texts.prompts import INSTRUCTION_STYLES, UNCONDITIONAL
from utils.texts.text_inputs import FORMATS, read_instructions

METRICS = Path("private") / "metrics.jsonl"
# Rates of false alarms at which it is told how many rows an attack finds.
FALSE_ALARMS = (0.001, 0.01)
HISTOGRAMS = ("private_noisy", "private", "synthetic", "selected")


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        base: fingerprint of the base model.
        own_cost: (epsilon, delta) of the run alone; None without a guarantee.
        metrics: lines of private/metrics.jsonl; none on a page for release.
    """

    folder: Path
    arguments: dict
    argv: list[str]
    versions: dict
    base: str | None
    own_cost: tuple[float, float] | None
    metrics: list[dict]

    @property
    def seconds(self) -> float:
        """What its steps took, as far as `metrics` say."""
        return sum(line.get("seconds", 0) for line in self.metrics)


@dataclass(frozen=True)
class Samples:
    """What was sampled into one folder.

    Attributes:
        shown: its samples, or none if the page may not speak of them.
        hidden: whether it may not: a prompt is not known to be synthetic or public.
    """

    folder: Path
    manifest: dict
    shown: list[dict]
    hidden: bool = False

    @property
    def prompted(self) -> bool:
        return self.manifest["prompt_style"] not in INSTRUCTION_STYLES

    @property
    def ends(self) -> dict[str, int]:
        """How often each reason ended a sample that is shown."""
        return dict(Counter(each["finish_reason"] for each in self.shown).most_common())

    @property
    def num_tokens(self) -> int:
        """Of all samples that are shown."""
        return sum(each.get("num_tokens", 0) for each in self.shown)


@dataclass(frozen=True)
class Selection:
    """What `resample_with_dp_histogram.resample` wrote."""

    folder: Path
    report: dict
    histograms: dict[str, list[float]]
    texts: list[str]


@dataclass(frozen=True)
class Topics:
    """What `topics.histogram` wrote, and the SHA-256 of its file."""

    folder: Path
    report: dict
    sha256: str

    @property
    def kept(self) -> list[dict]:
        """Topics above the noise, each with its number, keywords and noisy count."""
        return self.report["topics"]

    @property
    def lost(self) -> list[dict]:
        """Topics that are left out, likewise."""
        return self.report["left_out"]


@dataclass(frozen=True)
class Annotations:
    """What `query_gpt35_for_annotation` wrote; `usd` is None where the price is unknown."""

    folder: Path
    manifest: dict
    records: list[dict]
    usd: float | None
    about_price: str

    @property
    def model(self) -> str:
        return self.manifest["model"]

    @property
    def ends(self) -> dict[str, int]:
        """How many records have each status."""
        return dict(Counter(record["status"] for record in self.records).most_common())

    def tokens(self, side: str) -> int:
        """Tokens of the `prompt` or the `completion` side of all requests."""
        usages = (record.get("usage") for record in self.records)
        return sum(usage[f"{side}_tokens"] for usage in usages if usage)


def _folders(help: str, metavar: str) -> Any:
    return flag(help, [], type=Path, nargs="+", metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The flags that name what a page is made of, and for whom it is."""

    run: list[Path] = flag(
        "training runs that read the private rows", [], name="run", type=Path, nargs="*"
    )
    internal: bool = flag(
        "with everything computed from private data, for whoever may see that", False
    )
    histogram: list[Path] = _folders("ledgers of histograms of the same private rows", "LEDGER")
    samples: list[Path] = _folders("what inference.py sampled from adapters of the runs", "DIR")
    evaluations: list[Path] = _folders(
        "the --output of evaluation.distribution, .perplexity and others", "DIR"
    )
    synthetic_runs: list[Path] = _folders(
        "runs without DP on synthetic data alone: post-processing, which costs nothing. That it "
        "was synthetic is your claim, and the page says so",
        "RUN",
    )
    extraction: Path | None = flag(
        "the --output of extract, for its counts", type=Path, metavar="DIR"
    )
    selection: Path | None = flag("the --output of resample", type=Path, metavar="DIR")
    topics: Path | None = flag(
        "the --output of topics.histogram, by which --samples were drawn", type=Path, metavar="DIR"
    )
    annotations: Path | None = flag("the --output of annotate", type=Path, metavar="DIR")
    public_prompts: bool = flag(
        "the prompts of --samples are not private rows, and may be shown with their answers", False
    )
    real: Path | None = flag(
        f"real texts to show next to the synthetic ones, with --internal alone: {FORMATS}",
        type=Path,
        metavar="PATH",
    )
    split: str | None = flag("the split to read where --real is a saved DatasetDict")
    delta: float | None = flag(
        "the runs' if left out; needed where they differ", type=positive_float
    )
    data_name: str | None = flag(
        "what the private data are called on the page, in your own words; the names of the data "
        "sets if left out",
        metavar="WORDS",
    )


@dataclass(frozen=True)
class Material:
    """Everything a page is made of.

    Attributes:
        composed: of `privacy_checks.composition.composed_report`.
        data_name: what the private data are called.
        curve: epsilon over steps; empty without a guarantee.
        total_variation: delta at epsilon 0: a bound on how far one row can move the distribution
            of all outputs. None without a guarantee.
        catch_rates: how many of the rows that were there an attack finds at most, by how many of
            the others it takes for such, as shares; empty without a guarantee.
        real: private rows, which only an internal page may have.
    """

    internal: bool
    composed: dict
    ledgers: list[Path]
    runs: list[Training]
    synthetic_runs: list[Training]
    data_name: str = ""
    curve: list[dict] = field(default_factory=list)
    total_variation: float | None = None
    catch_rates: dict[float, float] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    extraction: dict | None = None
    selection: Selection | None = None
    topics: Topics | None = None
    annotations: Annotations | None = None
    results: list[dict] = field(default_factory=list)
    real: list[str] = field(default_factory=list)


def collect(sources: Sources) -> Material:
    """Read everything that the flags name.

    Without a guarantee nothing is covered, so a page for release gets the runs' flags alone.

    Raises:
        UsageError: a folder is none of its kind, is damaged, or holds what may not be shown.
    """
    internal, ledgers = sources.internal, sources.histogram
    runs = [read_training(path, internal) for path in sources.run]
    synthetic_runs = [read_training(path, internal) for path in sources.synthetic_runs]
    for run in synthetic_runs:
        if run.arguments["eps"] != -1:
            raise UsageError(
                f"--synthetic_runs {run.folder}: trained with differential privacy, so it read "
                "private rows; name it before the flags, as a RUN"
            )
    composed = composed_report(sources.run, ledgers, sources.delta)
    material = Material(internal, composed, ledgers, runs, synthetic_runs, data_name(sources, runs))
    if composed["guarantee"]:
        events = events_of(composed["mechanisms"])
        variation = compute_delta(events, 0.0, ADD_REMOVE)
        rates = dict(zip(FALSE_ALARMS, catch_rates(events, FALSE_ALARMS, ADD_REMOVE)))
        curve = epsilon_over_steps(composed)
        material = replace(material, curve=curve, total_variation=variation, catch_rates=rates)
    elif not internal:
        return material

    named = sources.run + sources.synthetic_runs
    adapters = None if internal else {digest for run in named for digest in weights_of(run)}
    samples = [read_sampled(path, adapters) for path in sources.samples]
    topics = read_topics(sources.topics, ledgers) if sources.topics else None
    for each in samples:
        require_topics(each, topics)
    selection = read_selection(sources.selection, ledgers) if sources.selection else None
    synthetic = {
        sample["text"].strip() for each in samples if not each.prompted for sample in each.shown
    }
    synthetic |= {text.strip() for text in selection.texts} if selection else set()
    if not (internal or sources.public_prompts):
        samples = [with_known_prompts(each, synthetic) for each in samples]
    annotations = None
    if sources.annotations:
        annotations = read_annotations(sources.annotations, None if internal else synthetic)
    extraction = read_extraction(sources.extraction) if sources.extraction else None
    if not internal:
        require_chain(links_of(sources, samples, extraction, selection, annotations))
    return replace(
        material,
        samples=samples,
        extraction=extraction,
        selection=selection,
        topics=topics,
        annotations=annotations,
        results=[each for path in sources.evaluations for each in read_folder(path, internal)],
        real=read_instructions(str(sources.real), sources.split) if sources.real else [],
    )


def data_name(sources: Sources, runs: list[Training]) -> str:
    """What the private data are called: as their owner says, or by the data sets' last names."""
    if sources.data_name:
        return sources.data_name
    names = [Path(str(run.arguments.get("dataset_name"))).name for run in runs]
    return " and ".join(dict.fromkeys(names))


def links_of(
    sources: Sources,
    samples: list[Samples],
    extraction: dict | None,
    selection: Selection | None,
    annotations: Annotations | None,
) -> list[Link]:
    """The folders whose texts have to lead back to a run, in order.

    Answers may repeat their prompts, so they are a source of other texts only where those are
    said to be public.
    """
    links = [
        Link(
            SAMPLES,
            each.folder,
            each.manifest,
            shards_of(each.folder),
            sources.public_prompts or not each.prompted,
        )
        for each in samples
    ]
    if sources.extraction and extraction is not None:
        file = sources.extraction / INSTRUCTIONS_FILE
        links.append(Link(EXTRACTION, sources.extraction, extraction, [file]))
    if selection:
        file = selection.folder / SELECTED_FILE
        links.append(Link(SELECTION, selection.folder, selection.report, [file]))
    if annotations:
        links.append(Link(ANNOTATIONS, annotations.folder, annotations.manifest))
    return links


@contextmanager
def damage_named(path: Path, writer: str) -> Iterator[None]:
    """Say in one line that `path` is not what `writer` writes, where reading it fails.

    Raises:
        UsageError: in place of what wrong content or a missing file raise.
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is missing or not what {writer} writes; restore it") from None


def read_object(path: Path, writer: str, **kinds: type) -> dict:
    """A JSON object with entries of the given types.

    Raises:
        UsageError: it is missing, is not such an object, or lacks an entry.
    """
    with damage_named(path, writer):
        value = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in kinds.items():
            if not isinstance(value[name], kind):
                raise TypeError(name)
    return value


def read_training(folder: Path, internal: bool) -> Training:
    """Read what a run's folder says of it; its losses on an internal page only."""
    if not holds_run(folder):
        raise UsageError(f"{folder} holds no run: there is no {CONFIG_FILE}")
    config = read_object(folder / CONFIG_FILE, "train.py", arguments=dict, argv=list, versions=dict)
    with damage_named(folder / CONFIG_FILE, "train.py"):
        float(config["arguments"]["eps"]), config["arguments"]["insecure_fixed_noise_seed"]
    own, own_cost = folder / "privacy_report.json", None
    if own.exists():
        claim = read_object(own, "train.py", guarantee=bool, epsilon=dict)
        with damage_named(own, "train.py"):
            if claim["guarantee"]:
                own_cost = float(claim["epsilon"]["upper"]), float(claim["delta"])
    metrics = folder / METRICS
    lines = list(read_jsonl(metrics)) if internal and metrics.is_file() else []
    with damage_named(metrics, "train.py"):
        for value in (value for line in lines for value in (line["step"], *losses_of(line))):
            float(value)
    return Training(
        folder=folder,
        arguments=config["arguments"],
        argv=config["argv"],
        versions=config["versions"],
        base=config.get("base_model_fingerprint"),
        own_cost=own_cost,
        metrics=lines,
    )


def losses_of(line: dict) -> list[float]:
    """The losses and seconds in a line of metrics, which pages show."""
    return [line[name] for name in ("train_loss", "validation_loss", "seconds") if name in line]


def weights_of(run: Path) -> list[str]:
    """SHA-256 of the weights of a run's adapter, which a folder of samples names."""
    files = [run / "adapter" / name for name in ADAPTER_WEIGHTS]
    return [sha256_of(file) for file in files if file.is_file()]


def read_sampled(folder: Path, adapters: set[str] | None) -> Samples:
    """Read a folder of samples.

    Args:
        adapters: hashes of the adapters that it may be sampled from; any if None.

    Raises:
        UsageError: it is damaged, or was sampled from an adapter that the report does not cover.
    """
    manifest = read_object(
        folder / "manifest.json", "inference.py",
        prompt_style=str, num_samples=int, model_name=str, versions=dict,
    )  # fmt: skip
    adapter = manifest.get("adapter_sha256")
    if adapters is not None and adapter is not None and adapter not in adapters:
        raise UsageError(
            f"--samples {folder}: sampled from the adapter {manifest.get('adapter_path')}, which "
            "is none of the runs named here, so no guarantee of theirs covers it; name its run"
        )
    with damage_named(folder, "inference.py"):
        samples = read_samples(folder)
        for sample in samples:
            if not all(isinstance(sample[key], str) for key in ("prompt", "text", "finish_reason")):
                raise TypeError
            int(sample["num_tokens"])
        found = Samples(folder, manifest, samples)
        if histogram_of(found) is not None and not all(type(s["topic"]) is int for s in samples):
            raise TypeError
    return found


def with_known_prompts(samples: Samples, synthetic: set[str]) -> Samples:
    """Leave all samples out where a prompt is not among the synthetic texts.

    Those of a histogram of topics are: `require_topics` has seen to it that it is paid for.
    """
    if (
        samples.manifest["prompt_style"] == UNCONDITIONAL
        or histogram_of(samples)
        or {each["prompt"].strip() for each in samples.shown} <= synthetic
    ):
        return samples
    return replace(samples, shown=[], hidden=True)


def histogram_of(samples: Samples) -> str | None:
    """The SHA-256 of the histogram of topics that samples were drawn by; None where by none."""
    return samples.manifest.get("topic_histogram_sha256")


def require_topics(samples: Samples, topics: Topics | None) -> None:
    """Refuse samples that were drawn by a histogram of topics other than the named one."""
    drawn_by = histogram_of(samples)
    if drawn_by is not None and (topics is None or drawn_by != topics.sha256):
        raise UsageError(
            f"--samples {samples.folder}: drawn by a histogram of topics that is not named here, "
            f"so its cost would be left out ({samples.manifest.get('topic_histogram')}); add its "
            "folder with --topics, and its ledger with --histogram"
        )


def read_topics(folder: Path, ledgers: Sequence[Path]) -> Topics:
    """Read a histogram of topics, and require that it is in a ledger of the composition.

    Raises:
        UsageError: it is damaged, or what it spent is not composed.
    """
    path, writer = folder / HISTOGRAM_FILE, "topics.histogram"
    report = read_object(
        path, writer,
        topics=list, left_out=list, ledger=dict, least_count=float, noise_multiplier=float,
    )  # fmt: skip
    with damage_named(path, writer):
        require_spent(f"--topics {folder}", report, ledgers)
        for name in ("topics", "left_out"):
            report[name] = [
                {"topic": int(each["topic"]), "keywords": str(each["keywords"])}
                | {"count": float(each["count"])}
                for each in report[name]
            ]
        report |= {"commands": commands_of(report)}
    return Topics(folder, report, sha256_of(path))


def require_spent(named: str, report: dict, ledgers: Sequence[Path]) -> None:
    """Refuse a histogram that is in no ledger of the composition.

    Args:
        named: the flag and the folder of it.
        report: of the histogram; "ledger" is its place in one.
    """
    spent = {record["chain"] for ledger in ledgers for record in read_ledger(ledger)}
    if report["ledger"]["chain"] not in spent:
        raise UsageError(
            f"{named}: its histogram is in no ledger named here, so its cost would be left out; "
            f"add --histogram {report['ledger']['path']}"
        )


def read_extraction(folder: Path) -> dict:
    """Read how many texts `resample_with_dp_histogram.extract` kept and dropped."""
    found = read_object(folder / PREPARATION_FILE, "extract", kept=int, dropped=dict)
    with damage_named(folder / PREPARATION_FILE, "extract"):
        dropped = {str(why): int(n) for why, n in found["dropped"].items()}
        return found | {"dropped": dropped, "commands": commands_of(found)}


def commands_of(record: dict) -> list[list[str]]:
    """The words of the commands that made a folder; earlier versions kept none."""
    return [list(map(str, words)) for words in record.get("commands", [])]


def read_selection(folder: Path, ledgers: Sequence[Path]) -> Selection:
    """Read a selection, and require that its histogram is in a ledger of the composition.

    Raises:
        UsageError: it is damaged, or what its histogram spent is not composed.
    """
    report = read_object(
        folder / "resampling_report.json", "resample",
        ledger=dict, selection=dict, total_variation_to_private=dict, noise_multiplier=float,
    )  # fmt: skip
    with damage_named(folder, "resample"):
        require_spent(f"--selection {folder}", report, ledgers)
        for name in ("num_samples", "distinct_rows", "pool", "overflow"):
            int(report["selection"][name])
        for name in ("synthetic", "selected"):
            float(report["total_variation_to_private"][name])
        read = json.loads((folder / "histograms.json").read_text(encoding="utf-8"))
        histograms = {name: list(map(float, read[name])) for name in HISTOGRAMS}
        if not all(0 < len(each) == len(histograms["private"]) for each in histograms.values()):
            raise ValueError
        texts = [str(row["instruction"]) for row in read_jsonl(folder / SELECTED_FILE)]
        report |= {"commands": commands_of(report)}
    return Selection(folder, report, histograms, texts)


def read_annotations(folder: Path, synthetic: set[str] | None) -> Annotations:
    """Read answers and what they cost.

    Args:
        synthetic: texts, stripped, of which each instruction must be one; any if None.

    Raises:
        UsageError: it is damaged, or holds instructions that may be private.
    """
    manifest = read_object(
        folder / "manifest.json", "annotate", model=str, base_url=str, decoding=dict
    )
    if not answers_file(folder).is_file():
        raise UsageError(f"--annotations {folder}: no {answers_file(folder).name} there")
    with damage_named(folder, "annotate"):
        records = list(read_records(folder).values())
        price, about = price_of(manifest["model"])
        job = Job(folder, manifest["model"], manifest["base_url"], manifest["decoding"], [])
        usd = Spending(job, price, None, records).spent if price else None
        statuses = [record["status"] for record in records]
        instructions = {record["instruction"].strip() for record in records}
        for usage in (record["usage"] for record in records if record["usage"]):
            int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    if synthetic is not None and (unknown := instructions - synthetic):
        raise UsageError(
            f"--annotations {folder}: {len(unknown):,} of {len(statuses):,} instructions are in "
            "none of --samples and --selection, so they may be private rows; name the folders that "
            "they come from"
        )
    return Annotations(folder, manifest, records, usd, about)


def read_folder(folder: Path, internal: bool) -> list[dict]:
    """Read the results of evaluations in a folder, the private ones on an internal page only.

    Raises:
        UsageError: there is none, or one is damaged.
    """
    results = read_results(folder, private=False)
    if internal:
        results += read_results(folder, private=True)
    if not results:
        which = "no result of an evaluation" if internal else "no result that may be released"
        raise UsageError(f"--evaluations {folder}: {which} there; leave it out")
    for result in results:
        with damage_named(folder / f"{result['tool']}.json", f"evaluation.{result['tool']}"):
            for name in ("title", "interval", "control"):
                result[name] = str(result[name])
            result["notes"] = list(map(str, result["notes"]))
            result["argv"], result["versions"] = list(result["argv"]), dict(result["versions"])
            result["scores"] = [vars(Score(**score)) for score in result["scores"]]
            for score in result["scores"]:
                score["value"] = float(score["value"])
                for name in ("low", "high", "control"):
                    score[name] = None if score[name] is None else float(score[name])
                score["n"] = None if score["n"] is None else int(score["n"])
            result["charts"] = [vars(Chart(**chart)) for chart in result["charts"]]
            for chart in result["charts"]:
                chart["lines"] = {
                    str(label): [(float(x), float(y)) for x, y in points]
                    for label, points in chart["lines"].items()
                }
    return results
