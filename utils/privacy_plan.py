"""The plan that alone decides privacy, the ledger of what was done, and the report of both.

Generator, sampler, noise, ledger and report all read one frozen `PrivacyPlan`. No torch.
"""

import argparse
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

from utils.accounting import (
    ADD_REMOVE,
    SampledGaussian,
    calibrate_noise_multiplier,
    compute_epsilon,
    pld_epsilon,
)
from utils.cli import UsageError
from utils.files import JsonlAppender, read_jsonl, write_atomic, write_json

LEDGER_FILE = "privacy_ledger.jsonl"
UNIT = "one example: a row of the prepared train split"
HISTOGRAM = "gaussian_histogram"
# What kind of line may follow the first one of a ledger.
FOLLOWERS = {"plan": "step", HISTOGRAM: HISTOGRAM}

COVERED = [
    "the adapter, every checkpoint of it, and whatever is computed from them: merged models, "
    "synthetic instructions, answers",
    "the number of steps, the learning rate and every other value of run_config.json",
]
NOT_COVERED = [
    "everything under private/: training and validation losses, gradient norms, clip fractions, "
    "realised batch sizes; also when they are shown on a terminal or sent to a tracker",
    "the choice of hyper-parameters over several runs on the same data",
    "data-dependent preparation, such as deduplication: the guarantee is for the prepared set",
    "text that the base model had already seen",
    "several rows about one person: the unit is a row",
    "timing and other side channels of the machine that trains",
]


def num_steps(num_epochs: float, num_examples: int, batch_size: int) -> int:
    """T = floor(num_epochs · N / total_bs), at least 1, in exact arithmetic."""
    return max(1, int(Fraction(str(num_epochs)) * num_examples / batch_size))


@dataclass(frozen=True)
class PrivacyPlan:
    """All that decides the guarantee of a DP training run; every field is a public constant.

    Attributes:
        num_examples: N.
        expected_batch_size: total_bs; the sampling rate is total_bs / N, and the divisor total_bs.
        steps: T, logical steps.
        clip_norm: C.
        noise_multiplier: sigma; the noise has deviation sigma · C per coordinate.
        delta, target_epsilon: the guarantee aimed at.
        reserved_histogram_sigma: noise of a histogram that the target also pays for, or None.
    """

    num_examples: int
    expected_batch_size: int
    steps: int
    clip_norm: float
    clip_function: str
    loss_normalization: str
    noise_multiplier: float
    delta: float
    target_epsilon: float
    reserved_histogram_sigma: float | None = None
    neighbouring_relation: str = ADD_REMOVE
    sampler: str = "poisson"

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.num_examples

    @property
    def reserved(self) -> list[SampledGaussian]:
        """The mechanisms beside training that the target epsilon pays for."""
        sigma = self.reserved_histogram_sigma
        return [] if sigma is None else [SampledGaussian(1.0, sigma, 1)]

    def events(self, steps: int) -> list[SampledGaussian]:
        """The mechanisms of `steps` logical steps of training."""
        return [SampledGaussian(self.sampling_rate, self.noise_multiplier, steps)]

    def digest(self) -> str:
        """A hash of every field, which ties ledger and checkpoints to this plan."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def require_same(self, other: "PrivacyPlan", where: str) -> None:
        """Raise a UsageError that names the first field in which `other` differs."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                raise UsageError(
                    f"{where} holds a run whose privacy plan has {field.name} {theirs}, not "
                    f"{ours}; use that value or another --job_sess"
                )


def plan_from_arguments(
    args: argparse.Namespace, num_examples: int
) -> tuple[PrivacyPlan | None, list[str]]:
    """Make the plan of a run from its flags and N; calibrate sigma where no flag gives it.

    Returns:
        The plan (None for a run without privacy) and warnings, one line each.

    Raises:
        UsageError: a value that gives no or a meaningless guarantee.
    """
    if args.total_bs > num_examples:
        raise UsageError(
            f"--total_bs {args.total_bs} exceeds the {num_examples} training examples of "
            f"{args.dataset_name}"
        )
    if args.eps == -1:
        return None, []
    warnings = []
    if args.delta >= 1 / num_examples:
        raise UsageError(
            f"--delta {args.delta}: must be below 1/N = {1 / num_examples:.2e}, or a mechanism "
            f"that publishes one example may pass; use {1 / (100 * num_examples):.0e}"
        )
    if args.delta > 1 / (10 * num_examples):
        warnings.append(f"--delta {args.delta} is above 1/(10 N) = {1 / (10 * num_examples):.1e}")
    steps = num_steps(args.num_epochs, num_examples, args.total_bs)
    sampling_rate = args.total_bs / num_examples
    histogram = args.reserve_histogram_sigma
    reserved = [] if histogram is None else [SampledGaussian(1.0, histogram, 1)]
    sigma = args.noise_multiplier
    if sigma is None:
        sigma = calibrate_noise_multiplier(args.eps, args.delta, sampling_rate, steps, reserved)
    plan = PrivacyPlan(
        num_examples=num_examples,
        expected_batch_size=args.total_bs,
        steps=steps,
        clip_norm=args.clip,
        clip_function=args.clip_function,
        loss_normalization=args.loss_normalization,
        noise_multiplier=sigma,
        delta=args.delta,
        target_epsilon=args.eps,
        reserved_histogram_sigma=histogram,
    )
    if args.noise_multiplier is not None:
        spent = compute_epsilon(plan.events(steps) + plan.reserved, plan.delta).upper
        if spent > args.eps:
            raise UsageError(
                f"--noise_multiplier {sigma} gives epsilon {spent:.3f} in {steps} steps, above "
                f"--eps {args.eps}; leave it out to have it calibrated"
            )
    return plan, warnings


def _next_chain(previous: str, content: dict) -> str:
    text = previous + json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _append(file: JsonlAppender, previous: str, content: dict) -> str:
    """Append a line that continues the chain; returns its chain value."""
    chain = _next_chain(previous, content)
    file.append([{**content, "chain": chain}])
    return chain


def read_ledger(path: str | os.PathLike) -> list[dict]:
    """Read a ledger and check its chain; the file is left as it is.

    Returns:
        A plan and the steps of its run, or histograms (see `record_histogram`); a torn last line
        is passed over.

    Raises:
        UsageError: the file was edited.
    """
    records, chain = [], ""
    for number, record in enumerate(read_jsonl(path), start=1):
        chain = _next_chain(chain, {k: value for k, value in record.items() if k != "chain"})
        kinds = ("plan", HISTOGRAM) if number == 1 else (FOLLOWERS[records[0]["kind"]],)
        if record.get("chain") != chain or record.get("kind") not in kinds:
            raise UsageError(
                f"{path}, line {number}: this ledger was edited or mixed with another run's; "
                "what was spent is no longer known"
            )
        records.append(record)
    return records


def require_head(path: str | os.PathLike, records: list[dict], head: dict) -> None:
    """Raise a UsageError unless `records` of the ledger `path` continue the one that had `head`."""
    lines = head["lines"]
    if len(records) < lines or records[lines - 1]["chain"] != head["chain"]:
        raise UsageError(
            f"{path} was truncated, or is another run's: {lines} lines were recorded, "
            f"{len(records)} are there"
        )


class Ledger:
    """Append-only record of the logical steps taken: one fsynced line a step, hash-chained.

    The first line holds the plan. Every line carries the SHA-256 of the line before it and its
    own content, so a line that was changed, moved, dropped from the middle or taken from another
    run breaks the chain. What is cut off the end shows against the count and chain value that
    checkpoints and reports keep (`head`, `require_head`).

    Raises:
        UsageError: the file was edited, or belongs to another plan.
    """

    def __init__(self, path: str | os.PathLike, plan: PrivacyPlan):
        self.path = Path(path)
        self._records = read_ledger(self.path) if self.path.exists() else []
        self._file = JsonlAppender(self.path)
        if self._records:
            plan.require_same(read_plan(self.path), str(self.path.parent))
        else:
            # The random run id makes the chains of two runs of one plan differ.
            self._append({"kind": "plan", "run": os.urandom(16).hex(), "plan": asdict(plan)})

    def _append(self, content: dict) -> None:
        previous = self._records[-1]["chain"] if self._records else ""
        self._records.append({**content, "chain": _append(self._file, previous, content)})

    def record_step(self, step: int) -> None:
        """Record that logical step `step` (from 1) is taken; call it before its noise is used."""
        self._append({"kind": "step", "step": step})

    @property
    def steps_recorded(self) -> int:
        return len(self._records) - 1

    @property
    def head(self) -> dict:
        """Number of lines and last chain value, for checkpoints and reports to keep."""
        return {"lines": len(self._records), "chain": self._records[-1]["chain"]}

    def require_head(self, head: dict) -> None:
        """Raise a UsageError unless this ledger continues the one that had `head`."""
        require_head(self.path, self._records, head)

    def close(self) -> None:
        self._file.close()


def read_histograms(path: str | os.PathLike, num_examples: int) -> list[dict]:
    """The lines of a ledger of histograms of a dataset of `num_examples`; none if there is none.

    Raises:
        UsageError: the file was edited, is no ledger of histograms, or is another dataset's.
    """
    records = read_ledger(path) if Path(path).exists() else []
    if records and records[0]["kind"] != HISTOGRAM:
        raise UsageError(f"{path} is the ledger of a training run; use another file")
    if records and records[0]["num_examples"] != num_examples:
        raise UsageError(
            f"{path} is of a private dataset of {records[0]['num_examples']:,} examples, not of "
            f"{num_examples:,}; each dataset has a ledger of its own"
        )
    return records


def record_histogram(
    path: str | os.PathLike,
    *,
    num_examples: int,
    noise_multiplier: float,
    num_bins: int,
    insecure: bool = False,
) -> None:
    """Append a Gaussian histogram to a ledger of its own; call it before its noise is used.

    Its sensitivity is 1: adding or removing one example moves one bin by 1.

    Args:
        path: a file of histograms of one private dataset; made where there is none.
        num_examples: N of the private dataset, public.
        noise_multiplier: deviation of the noise of every bin.
        insecure: noise came from a known seed.

    Raises:
        UsageError: see `read_histograms`.
    """
    records = read_histograms(path, num_examples)
    content = {
        "kind": HISTOGRAM,
        "run": os.urandom(16).hex(),
        "num_examples": num_examples,
        "noise_multiplier": noise_multiplier,
        "sensitivity": 1,
        "num_bins": num_bins,
        "insecure": insecure,
    }
    with JsonlAppender(path) as file:
        _append(file, records[-1]["chain"] if records else "", content)


def read_plan(ledger_path: str | os.PathLike) -> PrivacyPlan:
    """The plan in a ledger's first line."""
    for record in read_jsonl(ledger_path):
        try:
            return PrivacyPlan(**record["plan"])
        except (KeyError, TypeError):
            break
    raise UsageError(f"{ledger_path} holds no privacy plan")


def build_report(
    plan: PrivacyPlan | None,
    *,
    steps_taken: int = 0,
    steps_recorded: int = 0,
    ledger_head: dict | None = None,
    insecure: bool = False,
) -> dict:
    """The privacy report of a run.

    Args:
        plan: None for a run without privacy.
        steps_taken: logical steps in the released model.
        steps_recorded: steps in the ledger; those beyond `steps_taken` were noised, then lost in
            a crash, and never released.
        insecure: noise came from a known seed.

    Returns:
        A JSON-able dict; every epsilon is None where there is no guarantee.
    """
    if plan is None:
        return {
            "guarantee": False,
            "why": "trained without differential privacy",
            "epsilon": dict.fromkeys(("target", "lower", "estimate", "upper", "pld")),
            "covered": [],
            "not_covered": ["everything: treat the adapter and all its outputs as private data"],
        }
    lost = steps_recorded - steps_taken
    return {
        "guarantee": not insecure,
        "why": "noise and sampling came from a known seed (a test)" if insecure else "",
        "unit": UNIT,
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
        "epsilon": _epsilons(plan, steps_taken, insecure),
        "epsilon_if_lost_steps_were_seen": (
            _epsilons(plan, steps_recorded, insecure) if lost else None
        ),
        "reserved_histogram_sigma": plan.reserved_histogram_sigma,
        "sampler": "Poisson: every example independently with probability batch size / N",
        "noise_source": (
            "INSECURE: a fixed seed"
            if insecure
            else "ChaCha20 keyed from the operating system's entropy at every process start"
        ),
        "covered": [] if insecure else COVERED,
        "not_covered": NOT_COVERED,
        "plan_hash": plan.digest(),
        "ledger": ledger_head,
    }


def _epsilons(plan: PrivacyPlan, steps: int, insecure: bool) -> dict:
    if insecure:
        return {"target": plan.target_epsilon} | dict.fromkeys(
            ("lower", "estimate", "upper", "pld", "with_reserved_histogram")
        )
    events = plan.events(steps)
    bounds = compute_epsilon(events, plan.delta)
    return {
        "target": plan.target_epsilon,
        "lower": bounds.lower,
        "estimate": bounds.estimate,
        "upper": bounds.upper,
        "pld": pld_epsilon(events, plan.delta),
        "accountant": bounds.accountant,
        "with_reserved_histogram": (
            compute_epsilon(events + plan.reserved, plan.delta).upper if plan.reserved else None
        ),
    }


def report_markdown(report: dict) -> str:
    """The report as a page for a privacy officer."""
    lines = ["# Privacy report", ""]
    if not report["guarantee"]:
        lines += [f"**This run has no privacy guarantee: {report['why']}.**", ""]
        if "unit" not in report:
            return "\n".join([*lines, *(f"- {item}" for item in report["not_covered"]), ""])
    else:
        epsilon = report["epsilon"]
        lines += [
            f"The released model is **({epsilon['upper']:.3f}, {report['delta']:g})-differentially "
            f"private** for adding or removing {report['unit']}. N, the sampling rate, the number "
            "of steps and the clip norm are public constants.",
            "",
        ]
        unfinished = report["steps_planned"] - report["steps_taken"]
        if unfinished:
            lines += [f"{unfinished} planned steps have not been taken (yet).", ""]
        if report["steps_lost"]:
            seen = report["epsilon_if_lost_steps_were_seen"]["upper"]
            lines += [
                f"{report['steps_lost']} further steps were noised and then lost in a crash; they "
                f"were never released. If somebody had watched them, epsilon would be {seen:.3f}.",
                "",
            ]
    rows = [(name, value) for name, value in report.items() if _is_scalar(value)]
    rows += [(f"epsilon, {name}", value) for name, value in report["epsilon"].items()]
    lines += ["| quantity | value |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows]
    for title in ("covered", "not_covered"):
        lines += ["", f"## {title.replace('_', ' ').capitalize()}", ""]
        lines += [f"- {item}" for item in report[title]] or ["- nothing"]
    return "\n".join(lines) + "\n"


def _is_scalar(value) -> bool:
    return value not in (None, "") and isinstance(value, str | int | float)


def write_report(folder: str | os.PathLike, report: dict) -> None:
    """Write `privacy_report.json` and `.md` into a run's folder."""
    write_json(Path(folder) / "privacy_report.json", report)
    write_atomic(Path(folder) / "privacy_report.md", report_markdown(report))
