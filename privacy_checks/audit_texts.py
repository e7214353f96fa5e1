"""Audit a synthetic set: can anyone tell from the texts alone what was trained on?

    python -m privacy_checks.audit_texts --synthetic resampling/synthetic/instructions.jsonl \\
        --run outputs/mine --output audits/texts

A small model, of runs of up to five tokens, is fitted on the synthetic texts and nothing else. With
the canaries of --audit_canaries, best with --audit_canary_kind natural (an opening as users write
it, an ending that nobody expects), it scores the endings of those that were in and of those that
were out: lower bounds on epsilon at 95% and 99% follow as in privacy_checks.audit_run, next to what
a set that repeats every canary would show. The control is the same with coins that are tossed anew.
Exit code 1 if a bound at 99% is above the claim.

With --private and --held_out it also asks whether private rows score higher than rows of the same
source that were not trained on, which needs no canaries. That is computed from private rows without
noise, so it goes to OUTPUT/private and may not be shown.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, read_flags
from utils.texts.text_inputs import FORMATS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the audit of a synthetic set."""

    synthetic: str = flag(f"synthetic texts: {FORMATS}", required=True, metavar="PATH")
    run: Path = flag("folder of the run that they come from", type=Path, required=True)
    model_name: str | None = flag("its base model; the one that the run names if left out")
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

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluation.measures.intervals import BOOTSTRAP, bootstrap
from evaluation.measures.ngrams import NGrams
from evaluation.results import Result, Score, require_new_result, table, write_result
from privacy_checks.audit_run import AuditedRun, as_text, judged, plot, read_run
from privacy_checks.composition import arguments_of
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.files import write_atomic, write_json
from utils.folders import claimed
from utils.models.loading import load_tokenizer, quiet_libraries
from utils.runs.run_folder import model_name_of
from utils.secure_random import SecureRandom
from utils.texts.audit_canaries import NATURAL
from utils.texts.prompts import UNCONDITIONAL
from utils.texts.text_inputs import read_instructions
from utils.texts.tokens import TokenisedExamples, tokenised

TOOL = "audit_texts"
ATTACK = "texts of the synthetic set"
# Canaries are guessed in alone: that texts lack one says nothing of its coin.
SIDES = (1,)
FILES = (f"{TOOL}.json", f"{TOOL}.png")
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
    with claimed(settings.output):
        require_new_result(settings.output, TOOL)
        quiet_libraries()
        tokenizer = load_tokenizer(settings.model_name or model_name_of(settings.run))
        model = NGrams(
            rows_of(tokens_of(read_instructions(settings.synthetic, settings.split), tokenizer)),
            len(tokenizer),
        )
        refuted = False
        if has_canaries:
            audited = read_run(settings.run, settings.model_name, settings.histogram)
            result = audited_texts(audited, model, tokenizer)
            refuted = result["refuted"]
            print(as_text(result))
            print(f"control, with coins tossed anew: at least {result['control_best']:.3f}")
            print(f"of pairs, one in and one out, ranked right: {result['ranked_right']:.1%}")
            write_json(settings.output / FILES[0], result)
            write_atomic(settings.output / FILES[1], plot(result))
            say(f"written to {settings.output}")
        if settings.private and settings.held_out:
            training = read_instructions(settings.private, settings.split)
            held_out = read_instructions(settings.held_out, settings.held_out_split)
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


def row_scores(
    model: NGrams, data: TokenisedExamples, firsts: np.ndarray | None = None
) -> np.ndarray:
    """How well the model knows each example's tokens, float64 [examples].

    Args:
        firsts: int [examples], the first token of each that counts; the first with loss if None.
    """
    firsts = data.loss_starts if firsts is None else firsts
    return np.array([model.gain(row, first) for row, first in zip(rows_of(data), firsts.tolist())])


def audited_texts(run: AuditedRun, model: NGrams, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Bounds from the canaries, and the same with coins that nobody trained by; JSON-able."""
    canaries, ends = run.canaries, None
    if canaries.kind == NATURAL:
        openings = [canaries.opening(number) for number in range(canaries.count)]
        ends = tokens_of(openings, tokenizer).lengths - 1  # less the token at the end of a text
    data = canaries.examples(tokenizer, UNCONDITIONAL, MOST_TOKENS)
    scores = {ATTACK: row_scores(model, data, ends)}
    anew = np.zeros(len(run.inside), dtype=bool)
    anew[SecureRandom().bernoulli_indices(1, 2, len(anew))] = True
    return judged(run, scores, SIDES) | {
        "control_best": judged(replace(run, inside=anew), scores, SIDES)["best"],
        "ranked_right": ranked_right(scores[ATTACK][run.inside], scores[ATTACK][~run.inside]),
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
