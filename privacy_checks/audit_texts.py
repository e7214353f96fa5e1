"""Audit a synthetic set: can anyone tell from the texts alone what was trained on?

    python -m privacy_checks.audit_texts --synthetic resampling/synthetic/instructions.jsonl \\
        --run outputs/mine --output audits/texts

A small model, of runs of up to five tokens, is fitted on the synthetic texts and nothing else. With
the canaries of --audit_canaries, best with --audit_canary_kind natural (an opening as users write
it, an ending that nobody expects), it scores the endings of those that were in and of those that
were out. It sees what the texts repeat. What they only make likelier shows in an adapter that
train.py tuned on them without privacy, on the base that the run began with: --tuned scores the same
endings by how much it lowered their loss. Lower bounds on epsilon at 95% and 99% follow as in
privacy_checks.audit_run, next to what a set that repeats every canary would show. The control is
the same with coins that are tossed anew. Exit code 1 if a bound at 99% is above the claim.

With --private and --held_out it also asks whether private rows score higher than rows of the same
source that were not trained on, which needs no canaries. That is computed from private rows without
noise, so it goes to OUTPUT/private and may not be shown.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, read_flags
from utils.texts.prompts import UNCONDITIONAL
from utils.texts.text_inputs import FORMATS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the audit of a synthetic set."""

    synthetic: str = flag(f"synthetic texts: {FORMATS}", required=True, metavar="PATH")
    run: Path = flag("folder of the run that they come from", type=Path, required=True)
    model_name: str | None = flag("its base model; the one that the run names if left out")
    tuned: Path | None = flag(
        "an adapter that train.py tuned on --synthetic, with --prompt_style "
        f"{UNCONDITIONAL} --eps -1",
        type=Path,
        metavar="DIR",
    )
    perdevice_bs: int = flag("sequences of max_seq_len tokens on the device at once", 16)
    histogram: list[Path] = flag(
        "ledgers of histograms that the texts were selected by, which the claim is for as well",
        [],
        nargs="+",
        type=Path,
        metavar="LEDGER",
    )
    private: str | None = flag("the rows that were trained on", metavar="PATH")
    held_out: str | None = flag("rows of the same source that were not", metavar="PATH")
    split: str = flag("the split to read of a saved DatasetDict", "train")
    held_out_split: str = flag("the split of --held_out", "test")
    output: Path = flag("folder for the figures", type=Path, required=True, metavar="DIR")


answer_early(__name__, Settings, __doc__)

import json
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluation.measures.intervals import BOOTSTRAP, bootstrap
from evaluation.measures.ngrams import NGrams
from evaluation.perplexity import losses_of_models
from evaluation.results import Result, Score, require_new_result, table, write_result
from privacy_checks.audit_run import AuditedRun, as_text, judged, plot, read_run
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.files import write_atomic, write_json
from utils.folders import claimed
from utils.models.loading import load_tokenizer, quiet_libraries
from utils.runs.run_folder import (
    ADAPTER_HASH,
    REPORT_FILE,
    arguments_of,
    model_name_of,
    private_identity_of,
    require_own_adapter,
)
from utils.secure_random import SecureRandom
from utils.texts.audit_canaries import NATURAL, AuditCanaries
from utils.texts.data_sets import rows_fingerprint
from utils.texts.text_inputs import read_instructions
from utils.texts.tokens import TokenisedExamples, tokenised

TOOL = "audit_texts"
OF_RUNS, OF_TUNING = "runs of tokens in the texts", "losses of a model tuned on the texts"
# Canaries are guessed in alone: that texts lack one says nothing of its coin.
SIDES = (1,)
FILES = (f"{TOOL}.json", f"{TOOL}.png")
# An adapter of --tuned knows the texts and nothing else.
TUNED_WITH = {"eps": -1, "prompt_style": UNCONDITIONAL, "num_canaries": 0, "audit_canaries": 0}
# Tokens of a text that are looked at.
MOST_TOKENS = 2048
FALSE_ALARMS = 0.01


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    if bool(settings.private) != bool(settings.held_out):
        raise UsageError("--private and --held_out go together: one is the control of the other")
    has_canaries = bool(arguments_of(settings.run).get("audit_canaries"))
    if not (has_canaries or settings.private):
        raise UsageError(
            f"{settings.run} was trained without --audit_canaries: name --private and --held_out"
        )
    if settings.tuned and not has_canaries:
        raise UsageError(f"--tuned scores canaries, and {settings.run} has none; leave it out")
    with claimed(settings.output):
        require_new_result(settings.output, TOOL)
        texts = read_instructions(settings.synthetic, settings.split)
        training, held_out = list[str](), list[str]()
        if settings.private and settings.held_out:
            training = read_instructions(settings.private, settings.split)
            held_out = read_instructions(settings.held_out, settings.held_out_split)
        if settings.tuned:
            require_tuned_on(texts, settings.tuned)
        audited = None
        if has_canaries:
            audited = read_run(settings.run, settings.model_name, settings.histogram)
        quiet_libraries()
        tokenizer = load_tokenizer(settings.model_name or model_name_of(settings.run))
        model = NGrams(rows_of(tokens_of(texts, tokenizer)), len(tokenizer))
        refuted = False
        if audited:
            canaries = canaries_of(audited.canaries, tokenizer)
            scores = {OF_RUNS: row_scores(model, canaries)}
            if settings.tuned:
                scores[OF_TUNING] = lowered_losses(
                    audited, settings.tuned, canaries, settings.perdevice_bs
                )
            result = audited_texts(audited, scores)
            refuted = result["refuted"]
            print(as_text(result))
            print(f"control, with coins tossed anew: at least {result['control_best']:.3f}")
            for attack, share in result["ranked_right"].items():
                print(f"of pairs, one in and one out, ranked right by {attack}: {share:.1%}")
            write_json(settings.output / FILES[0], result)
            write_atomic(settings.output / FILES[1], plot(result))
            say(f"written to {settings.output}")
        if settings.private:
            members = membership(*(
                row_scores(model, tokens_of(rows, tokenizer)) for rows in (training, held_out)
            ))  # fmt: skip
            write_result(settings.output, members, vars(settings))
            print(table(members))
    return EXIT_FAILED if refuted else EXIT_OK


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenisedExamples:
    """Texts as the run would train on them."""
    rows = ({"instruction": text} for text in texts)
    return tokenised(rows, tokenizer, UNCONDITIONAL, MOST_TOKENS)


def rows_of(data: TokenisedExamples) -> list[list[int]]:
    """The token ids of each example."""
    ends = zip(data.offsets, data.offsets[1:])
    return [data.ids[start:end].tolist() for start, end in ends]


def require_tuned_on(texts: list[str], adapter: Path) -> None:
    """Refuse an adapter that saw anything but the texts: the run's own would tell more than they.

    Raises:
        UsageError: its run was trained on other rows or otherwise, or is not here to tell.
    """
    folder = adapter.resolve().parent
    arguments = arguments_of(folder)
    for name, value in TUNED_WITH.items():
        if (given := arguments.get(name, value)) != value:
            raise UsageError(f"--tuned {adapter} was trained with --{name} {given}, not {value}")
    if private_identity_of(folder).get("rows_fingerprint") != rows_fingerprint(texts):
        raise UsageError(
            f"--tuned {adapter} was not tuned on these {len(texts):,} texts, or its run's private/ "
            "is not here; train one on --synthetic, without sampled texts that were cut"
        )
    report = json.loads((folder / REPORT_FILE).read_text())
    require_own_adapter(folder, report, report.get(ADAPTER_HASH))


def canaries_of(canaries: AuditCanaries, tokenizer: PreTrainedTokenizerBase) -> TokenisedExamples:
    """All canaries as texts, with loss on the endings of natural ones alone."""
    data = canaries.examples(tokenizer, UNCONDITIONAL, MOST_TOKENS)
    if canaries.kind != NATURAL:
        return data
    openings = [canaries.opening(number) for number in range(canaries.count)]
    ends = tokens_of(openings, tokenizer).lengths - 1  # less the token at the end of a text
    return replace(data, loss_starts=ends.astype(np.int32))


def row_scores(model: NGrams, data: TokenisedExamples) -> np.ndarray:
    """How well the model knows each example's tokens with loss, float64 [examples]."""
    rows = zip(rows_of(data), data.loss_starts.tolist())
    return np.array([model.gain(row, first) for row, first in rows])


def lowered_losses(
    run: AuditedRun, adapter: Path, data: TokenisedExamples, perdevice_bs: int
) -> np.ndarray:
    """By how many nats an adapter lowers each example's loss below the base's, float64 [examples].

    Raises:
        UsageError: it is of another base, or its losses are not finite.
    """
    budget = perdevice_bs * run.arguments["max_seq_len"]
    losses = losses_of_models(run.model_name, [str(adapter)], data, run.arguments["dtype"], budget)
    lowered = losses[run.model_name][0] - losses[str(adapter)][0]
    if not np.isfinite(lowered).all():
        raise UsageError(f"--tuned {adapter} gives losses that are not finite; tune it more slowly")
    return lowered


def audited_texts(run: AuditedRun, scores: dict[str, np.ndarray]) -> dict:
    """Bounds from the canaries, and the same with coins that nobody trained by; JSON-able.

    Args:
        scores: by attack, float64 [canaries]; high for one that was in.
    """
    anew = np.zeros(len(run.inside), dtype=bool)
    anew[SecureRandom().bernoulli_indices(1, 2, len(anew))] = True
    return judged(run, scores, SIDES) | {
        "control_best": judged(replace(run, inside=anew), scores, SIDES)["best"],
        "ranked_right": {
            attack: ranked_right(each[run.inside], each[~run.inside])
            for attack, each in scores.items()
        },
    }


def ranked_right(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of pairs, one of either, in which the one that was in scores higher; 0.5 by chance.

    Ties count half (Mann and Whitney 1947). Few coins may all fall alike: without a pair, 0.5.
    """
    if not (len(inside) and len(outside)):
        return 0.5
    return float(shares_below(inside, outside).mean())


def shares_below(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The share of `outside` that each score of `inside` is above, float64 [inside]."""
    ordered = np.sort(outside)
    below, up_to = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(ordered))


def membership(training: np.ndarray, held_out: np.ndarray) -> Result:
    """Whether private rows score higher than held-out ones. For `private/` alone."""
    above = shares_below(training, held_out)
    threshold = np.quantile(held_out, 1 - FALSE_ALARMS)
    found = (training > threshold).astype(float)
    subject = f"{len(training):,} private rows, {len(held_out):,} held-out ones"
    scores = [
        Score(name, subject, float(values.mean()), *bootstrap(values, statistic=np.mean),
              control, "lower", len(values))
        for name, values, control in (
            ("pairs in which the private row scores higher, share", above, 0.5),
            (f"private rows found at {FALSE_ALARMS:.0%} false alarms, share", found,
             float((held_out > threshold).mean())),
        )
    ]  # fmt: skip
    return Result(
        TOOL, "What the synthetic texts give away of who was trained on", True,
        f"{BOOTSTRAP}, of private rows", scores, "by chance",
        notes=["scores: how much likelier runs of five tokens of a row are in the synthetic texts"],
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
