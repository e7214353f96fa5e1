"""What the folders of a pipeline hold, and which of it may be shown to whom.

A page for release is made of what the composed guarantee covers: ledgers, flags, texts of adapters
that were trained here, the noisy histogram. Nothing under a private/ folder is opened for it, and
no text is shown that may be a private row: prompts and annotated instructions have to be synthetic
themselves. Wall times of training are left out too, since they follow from who was sampled.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.results import Chart, Score, read_results
from privacy_checks.composition import composed_report, epsilon_over_steps, events_of
from query_gpt35_for_annotation.job import Job, answers_file, read_records
from query_gpt35_for_annotation.spending import Spending, price_of
from utils.cli import UsageError
from utils.command_line.sampling_flags import ADAPTER_WEIGHTS
from utils.files import read_jsonl, sha256_of
from utils.folders import PREPARATION_FILE
from utils.privacy.accounting import ADD_REMOVE, compute_delta
from utils.privacy.ledger import read_ledger
from utils.runs.run_folder import CONFIG_FILE, holds_run
from utils.sampling.shards import read_samples
from utils.texts.prompts import UNCONDITIONAL
from utils.texts.text_inputs import read_instructions

METRICS = Path("private") / "metrics.jsonl"
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


@dataclass(frozen=True)
class Samples:
    """What was sampled into one folder.

    Attributes:
        shown: those of its samples that the page may speak of.
        hidden: how many it may not: their prompts are not known to be synthetic or public.
    """

    folder: Path
    manifest: dict
    shown: list[dict]
    hidden: int

    @property
    def prompted(self) -> bool:
        return self.manifest["prompt_style"] != UNCONDITIONAL


@dataclass(frozen=True)
class Selection:
    """What `resample_with_dp_histogram.resample` wrote."""

    folder: Path
    report: dict
    histograms: dict[str, list[float]]
    texts: list[str]


@dataclass(frozen=True)
class Annotations:
    """What `query_gpt35_for_annotation` wrote; `usd` is None where the price is unknown."""

    folder: Path
    model: str
    records: list[dict]
    usd: float | None
    about_price: str


@dataclass(frozen=True)
class Material:
    """Everything a page is made of.

    Attributes:
        composed: of `privacy_checks.composition.composed_report`.
        curve: epsilon over steps; empty without a guarantee.
        total_variation: delta at epsilon 0: a bound on how far one row can move the distribution
            of all outputs. None without a guarantee.
        real: private rows, which only an internal page may have.
    """

    internal: bool
    composed: dict
    ledgers: list[Path]
    runs: list[Training]
    synthetic_runs: list[Training]
    curve: list[dict] = field(default_factory=list)
    total_variation: float | None = None
    samples: list[Samples] = field(default_factory=list)
    extraction: dict | None = None
    selection: Selection | None = None
    annotations: Annotations | None = None
    results: list[dict] = field(default_factory=list)
    real: list[str] = field(default_factory=list)


def collect(args: argparse.Namespace) -> Material:
    """Read everything that the flags name.

    Without a guarantee nothing is covered, so a page for release gets the runs' flags alone.

    Args:
        args: flags of `evaluation.report`.

    Raises:
        UsageError: a folder is none of its kind, is damaged, or holds what may not be shown.
    """
    runs = [read_training(path, args.internal) for path in args.run]
    synthetic_runs = [read_training(path, args.internal) for path in args.synthetic_runs]
    for run in synthetic_runs:
        if run.arguments["eps"] != -1:
            raise UsageError(
                f"--synthetic_runs {run.folder}: trained with differential privacy, so it read "
                "private rows; name it before the flags, as a RUN"
            )
    composed = composed_report(args.run, args.histogram, args.delta)
    material = {
        "internal": args.internal,
        "composed": composed,
        "ledgers": args.histogram,
        "runs": runs,
        "synthetic_runs": synthetic_runs,
    }
    if composed["guarantee"]:
        events = events_of(composed["mechanisms"])
        material["curve"] = epsilon_over_steps(composed)
        material["total_variation"] = compute_delta(events, 0.0, ADD_REMOVE)
    elif not args.internal:
        return Material(**material)

    adapters = {digest for run in args.run + args.synthetic_runs for digest in weights_of(run)}
    found = [read_sampled(path, None if args.internal else adapters) for path in args.samples]
    selection = read_selection(args.selection, args.histogram) if args.selection else None
    synthetic = {
        sample["text"].strip() for each in found if not each.prompted for sample in each.shown
    }
    synthetic |= {text.strip() for text in selection.texts} if selection else set()
    anything = args.internal or args.public_prompts
    return Material(
        **material,
        samples=[each if anything else with_known_prompts(each, synthetic) for each in found],
        extraction=read_extraction(args.extraction) if args.extraction else None,
        selection=selection,
        annotations=read_annotations(args.annotations, None if args.internal else synthetic)
        if args.annotations
        else None,
        results=[result for path in args.evaluations for result in read_folder(path, args)],
        real=read_instructions(str(args.real), args.split) if args.real else [],
    )


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
        UsageError: it is not there, is no such object, or an entry is missing.
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
        told = read_object(own, "train.py", guarantee=bool, epsilon=dict)
        with damage_named(own, "train.py"):
            if told["guarantee"]:
                own_cost = float(told["epsilon"]["upper"]), float(told["delta"])
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
        prompt_style=str, num_samples=int, model_name=str, instruction_file=str, versions=dict,
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
    return Samples(folder, manifest, samples, 0)


def with_known_prompts(samples: Samples, synthetic: set[str]) -> Samples:
    """Leave out what answers a prompt that is not among the synthetic texts."""
    if not samples.prompted:
        return samples
    shown = [sample for sample in samples.shown if sample["prompt"].strip() in synthetic]
    return Samples(samples.folder, samples.manifest, shown, len(samples.shown) - len(shown))


def read_extraction(folder: Path) -> dict:
    """Read how many texts `resample_with_dp_histogram.extract` kept and dropped."""
    found = read_object(folder / PREPARATION_FILE, "extract", kept=int, dropped=dict)
    with damage_named(folder / PREPARATION_FILE, "extract"):
        return found | {"dropped": {str(why): int(n) for why, n in found["dropped"].items()}}


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
        spent = {record["chain"] for ledger in ledgers for record in read_ledger(ledger)}
        if report["ledger"]["chain"] not in spent:
            raise UsageError(
                f"--selection {folder}: its histogram is in no ledger named here, so its cost "
                f"would be left out; add --histogram {report['ledger']['path']}"
            )
        for name in ("num_samples", "distinct_rows", "pool", "overflow"):
            int(report["selection"][name])
        for name in ("synthetic", "selected"):
            float(report["total_variation_to_private"][name])
        read = json.loads((folder / "histograms.json").read_text(encoding="utf-8"))
        histograms = {name: list(map(float, read[name])) for name in HISTOGRAMS}
        if not all(0 < len(each) == len(histograms["private"]) for each in histograms.values()):
            raise ValueError
        texts = [str(row["instruction"]) for row in read_jsonl(folder / "selected.jsonl")]
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
        job = Job(folder, **manifest, instructions=[])
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
    return Annotations(folder, manifest["model"], records, usd, about)


def read_folder(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Read the results of evaluations in a folder, the private ones on an internal page only.

    Raises:
        UsageError: there is none, or one is damaged.
    """
    results = read_results(folder, private=False)
    if args.internal:
        results += read_results(folder, private=True)
    if not results:
        which = "no result of an evaluation" if args.internal else "no result that may be released"
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
            result["charts"] = [vars(Chart(**chart)) for chart in result["charts"]]
            for chart in result["charts"]:
                chart["lines"] = {
                    str(label): [(float(x), float(y)) for x, y in points]
                    for label, points in chart["lines"].items()
                }
    return results


# ------------------------------------------------------------------------ what may be printed

_SECRET = re.compile(r"(?i)\b(?:sk|hf|ghp|xox[bp])[-_][\w-]{8,}")
_SECRET_FLAG = re.compile(r"(?i)(--\w*(?:api_?key|token|secret|password))(=|\s+)\S+")
# A path that leaves the current folder, where a word begins.
_ELSEWHERE = re.compile(
    r"(?<![^\s='\"(,:\[])(?:~[\w.-]*|\.\.)?/(?!/)(?:[^\s'\"(),:;]*/)?([^\s'\"(),:;/]+)/?"
)


def portable(text: object) -> str:
    """`text` without what it says of this machine, or a key.

    Paths below the current folder become relative to it; of others the last part stays.
    """
    text = str(text).replace(f"{Path.cwd()}/", "")
    text = _SECRET_FLAG.sub(r"\1\2[secret]", _SECRET.sub("[secret]", text))
    return _ELSEWHERE.sub(r"…/\1", text)


def portable_word(word: object) -> str:
    """`portable` of one word of a command line, or of a path: either may hold spaces."""
    flag, equals, value = str(word).rpartition("=") if str(word).startswith("-") else ("", "", word)
    value = str(value).replace(f"{Path.cwd()}/", "")
    if re.match(r"(~[\w.-]*|\.\.)?/", value):
        value = f"…/{Path(value).name}"
    return portable(f"{flag}{equals}{value}")


def printable(text: str) -> str:
    """`text` without what no page can hold or what turns its lines round: each becomes U+FFFD.

    That is control characters but for tab and newline, halves of surrogate pairs, and the marks
    that override the direction of text.
    """
    text = text.replace("\r\n", "\n")
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]",
        "\ufffd",
        text,
    )
