"""What is promised, for whom, and what is not: told once."""

import os
from dataclasses import asdict
from pathlib import Path

from utils.files import write_atomic, write_json
from utils.privacy.accounting import compute_epsilon, epsilon_bounds
from utils.privacy.plan import PrivacyPlan

UNIT = "one example: a row of the prepared train split"


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
            "epsilon": dict.fromkeys(("target", "lower", "estimate", "upper", "pld", "prv")),
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
            ("lower", "estimate", "upper", "pld", "prv", "with_reserved_histogram")
        )
    events = plan.events(steps)
    return {
        "target": plan.target_epsilon,
        **asdict(epsilon_bounds(events, plan.delta)),
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
