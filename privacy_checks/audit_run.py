"""Audit a run of your own: what do its canaries give away, next to what it claims?

    python -m privacy_checks.audit_run outputs/mine --output audits/mine

For a run with --audit_canaries: made-up rows that a secret coin put in or left out. A canary's
score is by how much the adapter lowered its loss below the base's, and, with checkpoints, how much
of its gradient is in what was released between them: the more of these (--save_steps 1
--keep_checkpoints 1000), the more it shows. The highest scores are guessed in, the lowest out, and
so many right guesses refute every epsilon that would not allow them (Steinke, Nasr and Jagielski
2023; Mahloujifar et al. 2024). Shown are lower bounds at 95% and 99%, each next to what the same
canaries would have shown of a run without noise: an audit cannot tell more than that. Exit code 1
if a bound at 99% is above the claim.

Scores and coins stay under the run's private/. The bounds are computed from canaries alone, which
are made up and nobody's, so they may be shown to anyone; --output gets them as JSON and a picture.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.command_line.parser import answer_early, flag, positive_int, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the audit of a run."""

    run: Path = flag("folder of a finished run, outputs/JOB_SESS", name="run", type=Path)
    model_name: str | None = flag("its base model; the one that the run names if left out")
    perdevice_bs: int = flag("sequences of max_seq_len tokens on the device at once", 16)
    max_checkpoints: int | None = flag(
        "so many checkpoints, 2 or more, from the first to the last one: each but the last takes a "
        "backward pass of every canary, and what was released long before the next one is seen "
        "less of; all of them if left out",
        type=positive_int,
    )
    output: Path | None = flag("folder for JSON and picture", type=Path, metavar="DIR")


answer_early(__name__, Settings, __doc__)

import io
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from evaluation.perplexity import losses_of_models, tokenizer_of
from privacy_checks.composition import by_kind, composed_report
from privacy_checks.estimators import correct_guesses, one_run, one_run_f_dp
from privacy_checks.signature import head_of
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.dp_utils import PerExampleGradients
from utils.files import write_atomic, write_json
from utils.folders import claimed, require_absent
from utils.models.adapter_info import read_adapter_info
from utils.models.language_model import LanguageModel
from utils.models.loading import load_base_model, quiet_libraries, resolve_dtype
from utils.models.lora import attach_saved
from utils.privacy.accounting import ADD_REMOVE
from utils.privacy.ledger import LEDGER_FILE
from utils.progress import Progress
from utils.runs.batching import cut_microbatches
from utils.runs.checkpointing import (
    Checkpoint,
    read_checkpoint,
    restore_adapter,
    step_of,
    whole_checkpoints,
)
from utils.runs.run_folder import COINS, arguments_of, model_name_of, private_identity_of
from utils.texts.audit_canaries import COINS_FILE, AuditCanaries, coins_fingerprint, read_coins
from utils.texts.tokens import TokenisedExamples

CONFIDENCES = (0.95, 0.99)
# A fourth, an eighth and a sixteenth of the canaries are guessed in, and as many others out; or
# none out, for a canary that no step drew leaves no trace of its coin.
PARTS = (4, 8, 16)
SIDES = (2, 1)
ESTIMATORS: dict[str, Callable[[int, int, int, float, float], float]] = {
    "pure": one_run, "f-DP": one_run_f_dp,
}  # fmt: skip
OF_LOSSES, OF_CHECKPOINTS = "losses of the adapter", "gradients at the checkpoints"
# Against which canaries' overlaps, 1 with themselves, are weighed in a regression.
RIDGE = 0.5
# Numbers that stand for a canary's gradient.
SKETCH = 1 << 14
# Of a run without a guarantee.
NO_DELTA = 1e-5
# What a reader needs in order to read the figures right.
NOTES = (
    "All bounds of a confidence hold together. pure: for any mechanism; f-DP: for one as hard to "
    "test as a Gaussian.",
    "A lower bound is what these attacks showed, and no estimate: the true epsilon lies above it. "
    "The last column is what is expected where every canary that a step drew is recognised.",
)
FILES = ("audit_run.json", "audit_run.png")


# ------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    if settings.max_checkpoints == 1:
        raise UsageError(
            "--max_checkpoints 1: what is seen was released between two; give 2 or more"
        )
    with claimed(settings.output) if settings.output else nullcontext():
        if settings.output:
            require_absent(settings.output, FILES)
        audited = read_run(settings.run, settings.model_name)
        checkpoints = checkpoints_of(audited, settings.max_checkpoints)
        scores = scores_of(audited, settings.perdevice_bs, checkpoints)
        result = judged(audited, scores) | {"checkpoints": len(checkpoints)}
        print(as_text(result))
        if settings.output:
            write_json(settings.output / FILES[0], result)
            write_atomic(settings.output / FILES[1], plot(result))
            say(f"written to {settings.output}")
    return EXIT_FAILED if result["refuted"] else EXIT_OK


@dataclass(frozen=True)
class AuditedRun:
    """A finished run with canaries of an audit.

    Attributes:
        arguments: what it was trained with.
        inside: bool [canaries], which were in; never written, nor shown.
        claimed: its epsilon at `delta`; None where it has no guarantee.
        drawn: the probability with which some step drew a canary.
    """

    folder: Path
    model_name: str
    arguments: dict
    canaries: AuditCanaries
    inside: np.ndarray
    claimed: float | None
    delta: float
    drawn: float


def read_run(folder: Path, model_name: str | None, histograms: Sequence[Path] = ()) -> AuditedRun:
    """Read a run, its coins, and what its ledger says that it spent.

    Args:
        model_name: its base model; the one that it names if None.
        histograms: ledgers of histograms of the same data, which the claim is for as well.

    Raises:
        UsageError: there is no finished run, it has no canaries, or its ledger does not fit it.
    """
    arguments = arguments_of(folder)
    if not (count := arguments.get("audit_canaries", 0)):
        raise UsageError(f"{folder} was trained without --audit_canaries: nothing shows what leaks")
    read_adapter_info(folder / "adapter")
    canaries = AuditCanaries(count, arguments["audit_canary_kind"], arguments["seed"])
    coins = read_coins(folder, count)
    # Runs of earlier versions kept no fingerprint.
    if private_identity_of(folder).get(COINS, known := coins_fingerprint(coins)) != known:
        raise UsageError(
            f"{folder / 'private' / COINS_FILE} holds other coins than the run was trained with; "
            "restore the run's own from a backup"
        )
    report = composed_report(folder, histograms)
    claimed, delta, drawn = None, NO_DELTA, min(1.0, arguments["num_epochs"])
    if report["guarantee"]:
        claimed, delta = report["epsilon"][ADD_REMOVE]["upper"], report["delta"]
        training = by_kind(report["mechanisms"])[0][0]
        drawn = 1 - (1 - training["sampling_rate"]) ** training["times"]
    return AuditedRun(
        folder,
        model_name or model_name_of(folder),
        arguments,
        canaries,
        canaries.inside(coins),
        claimed,
        delta,
        drawn,
    )


# ------------------------------------------------------------------------ the scores


def checkpoints_of(run: AuditedRun, most: int | None) -> list[Path]:
    """The whole ones, the oldest first, or so many of them, from the first to the last."""
    # Before the first step there is no moment.
    found = [path for path in whole_checkpoints(run.folder / "checkpoints") if step_of(path)][::-1]
    places = np.arange(len(found))
    if most and most < len(found):
        places = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[place] for place in places]


def scores_of(
    run: AuditedRun, perdevice_bs: int, checkpoints: Sequence[Path]
) -> dict[str, np.ndarray]:
    """A score for each canary by each attack, float64 [canaries]; high for one that was in."""
    quiet_libraries()
    adapter, max_seq_len = str(run.folder / "adapter"), run.arguments["max_seq_len"]
    tokenizer = tokenizer_of(run.model_name, [adapter])
    data = run.canaries.examples(tokenizer, run.arguments["prompt_style"], max_seq_len)
    budget = perdevice_bs * max_seq_len
    losses = losses_of_models(run.model_name, [adapter], data, run.arguments["dtype"], budget)
    scores = {OF_LOSSES: losses[run.model_name][0] - losses[adapter][0]}
    if len(checkpoints) > 1:
        scores[OF_CHECKPOINTS] = checkpoint_scores(run, checkpoints, data, budget)
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise UsageError(f"{run.folder}: {name} give scores that are not finite")
    return scores


def checkpoint_scores(
    run: AuditedRun, checkpoints: Sequence[Path], data: TokenisedExamples, budget: int
) -> np.ndarray:
    """How much of each canary is in what was released between checkpoints, summed over these.

    The first moment m of AdamW is a moving average of the noisy gradients, so of those of the steps
    from a to b alone m_b - beta^(b - a) m_a, in which a canary that was drawn has its gradient
    (Nasr et al. 2023). Canaries' gradients overlap, so all are fitted together: ridge regression on
    their directions at the parameters of step a.

    Args:
        checkpoints: two or more, the oldest first.

    Returns:
        float64 [canaries].
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base_model(run.model_name, resolve_dtype(run.arguments["dtype"], device))
    model = attach_saved(base, run.model_name, str(run.folder / "adapter"), merge=False)
    model.to(device).eval()
    before = read_checkpoint(checkpoints[0])
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in before.adapter)
    gradients, language_model = PerExampleGradients(model), LanguageModel(base)
    sketch = Sketch(gradients.num_parameters, device)
    (microbatches,) = cut_microbatches(np.arange(len(data)), data.lengths, budget)
    scores = np.zeros(len(data))
    total = len(microbatches) * (len(checkpoints) - 1)
    passes = Progress(None, "gradients of canaries", unit="microbatch", total=total)
    for path in checkpoints[1:]:
        restore_adapter(gradients.parameters, before.adapter)
        rows = torch.zeros(len(data), sketch.size, device=device)
        for part in microbatches:
            batch = data.collate(part.examples, 0, device)
            with gradients.capture(len(part.examples)):
                language_model.example_losses(batch)[0].sum().backward()
            for place, example in enumerate(part.examples):
                rows[example] = sketch(gradients.of_example(place)[: gradients.num_parameters])
            passes.update()
        rows = torch.nn.functional.normalize(rows).double()
        after = read_checkpoint(path)
        (first, beta), (last, _) = moment_of(before), moment_of(after)
        steps = after.state["step"] - before.state["step"]
        released = torch.nn.functional.normalize(
            sketch((last - beta**steps * first).to(device)).double(), dim=0
        )
        overlaps = rows @ rows.T + RIDGE * torch.eye(len(rows), device=device)
        scores += torch.linalg.solve(overlaps, rows @ released).cpu().numpy()
        before = after  # so that two are in memory
    passes.close()
    return scores


def moment_of(checkpoint: Checkpoint) -> tuple[torch.Tensor, float]:
    """The optimizer's first moment, float32 [parameters], and what a step multiplies it with."""
    optimizer = checkpoint.optimizer["optimizer"]
    states, group = optimizer["state"], optimizer["param_groups"][0]
    name, beta = (
        ("exp_avg", group["betas"][0])
        if "betas" in group
        else ("momentum_buffer", group["momentum"])
    )
    moments = [states[place][name] for place in sorted(states)]
    return torch.cat([moment.flatten() for moment in moments]), beta


class Sketch:
    """Vectors of as many numbers as memory has room for, with about the same inner products.

    Every coordinate is added, with a random sign, to one of `SKETCH` sums (Charikar, Chen and
    Farach-Colton 2002, "Finding frequent items in data streams"); fewer coordinates stay as they
    are. The generator is public: what is sketched is released, or made up.
    """

    def __init__(self, coordinates: int, device: torch.device):
        self.size = min(coordinates, SKETCH)
        random = torch.Generator().manual_seed(0)
        self._places = torch.randint(SKETCH, (coordinates,), generator=random).to(device)
        self._signs = (2.0 * torch.randint(2, (coordinates,), generator=random) - 1).to(device)

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        if len(vector) == self.size:
            return vector
        return vector.new_zeros(self.size).index_add_(0, self._places, vector * self._signs)


# ------------------------------------------------------------------------ the verdict


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon, and what it would be about had there been no noise."""

    confidence: float
    attack: str
    assumes: str
    epsilon: float
    without_noise: float


def judged(run: AuditedRun, scores: dict[str, np.ndarray], sides: Sequence[int] = SIDES) -> dict:
    """Bounds by attack and estimator, what they could be, and the verdict; JSON-able.

    Args:
        sides: of `SIDES`, among which public figures choose, so that the bounds hold as they would
            of one way to guess.
    """
    attacks, perfect = len(scores), partial(right_without_noise, run)
    guessers = {
        name: partial(correct_guesses, each[run.inside], each[~run.inside])
        for name, each in scores.items()
    }
    cases = [(confidence, name) for confidence in CONFIDENCES for name in ESTIMATORS]
    expected = {
        each: [bound(perfect, run, each, *case, attacks) for case in cases] for each in sides
    }
    chosen = max(sides, key=lambda each: sum(expected[each]))
    bounds = [
        Bound(
            confidence=confidence,
            attack=attack,
            assumes=assumption,
            epsilon=bound(right, run, chosen, confidence, assumption, attacks),
            without_noise=most,
        )
        for (confidence, assumption), most in zip(cases, expected[chosen])
        for attack, right in guessers.items()
    ]
    best = max(each.epsilon for each in bounds if each.confidence == max(CONFIDENCES))
    return {
        "run": str(run.folder),
        **head_of(run.folder / LEDGER_FILE),
        "canaries": run.canaries.count,
        "kind": run.canaries.kind,
        "drawn": run.drawn,
        "claimed_epsilon": run.claimed,
        "delta": run.delta,
        "bounds": [asdict(each) for each in bounds],
        "best": best,
        "refuted": run.claimed is not None and best > run.claimed,
    }


def right_without_noise(run: AuditedRun, as_in: int, as_out: int) -> int:
    """How many guesses are right, as expected of who recognises each canary that a step drew.

    Of all others the best guess is that they were out.
    """
    recognised = run.canaries.count / 2 * run.drawn
    are_in = (run.canaries.count / 2 - recognised) / (run.canaries.count - recognised)
    right = min(as_in, recognised) + max(0.0, as_in - recognised) * are_in
    return math.floor(right + as_out * (1 - are_in))


def bound(
    right: Callable[[int, int], int],
    run: AuditedRun,
    sides: int,
    confidence: float,
    assumption: str,
    attacks: int,
) -> float:
    """The best lower bound on epsilon over the numbers of guesses.

    Its confidence holds for all attacks, estimators and numbers of guesses together (Bonferroni).

    Args:
        right: how many guesses are right, by how many are called in and out.
        sides: of `SIDES`, whether some are called out.
        assumption: of `ESTIMATORS`.
        attacks: how many there are.
    """
    each = 1 - (1 - confidence) / (attacks * len(ESTIMATORS) * len(PARTS))
    found, count = [0.0], run.canaries.count
    for part in PARTS:
        if as_in := count // part:
            as_out = as_in * (sides - 1)
            correct = right(as_in, as_out)
            estimate = ESTIMATORS[assumption]
            found.append(estimate(correct, as_in + as_out, count, run.delta, each))
    return max(found)


def as_text(result: dict) -> str:
    """The result for a terminal."""
    claimed, best = result["claimed_epsilon"], result["best"]
    claim = "nothing" if claimed is None else f"epsilon {claimed:.3f}"
    rows = [("confidence", "attack", "assumes", "epsilon, at least", "without noise")]
    rows += [
        (f"{each['confidence']:.0%}", each["attack"], each["assumes"], f"{each['epsilon']:.3f}",
         f"{each['without_noise']:.3f}")
        for each in result["bounds"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    if result["refuted"]:
        verdict = f"REFUTED: epsilon is at least {best:.3f}, and {claimed:.3f} was claimed"
    elif claimed is None:
        verdict = f"nothing was claimed; epsilon is at least {best:.3f}"
    else:
        verdict = f"not refuted: at least {best:.3f}, and {claimed:.3f} is claimed"
        if claimed > (most := max(each["without_noise"] for each in result["bounds"])):
            verdict += (
                f"; canaries that are so few and seldom drawn refute no claim above {most:.3f}, "
                "train with more, or for more steps"
            )
    return "\n".join(
        [
            f"Audit of {result['run']}: {result['canaries']} canaries ({result['kind']}), each in "
            f"with probability 1/2, and drawn by some step with probability {result['drawn']:.2f}. "
            f"Claimed is {claim}; delta is {result['delta']:g}.",
            *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
            *NOTES,
            verdict,
        ]
    )


def plot(result: dict) -> bytes:
    """A PNG of the bounds, of what they could be at most, and of the claim."""
    from matplotlib.figure import Figure

    bounds, claimed = result["bounds"][::-1], result["claimed_epsilon"]
    figure = Figure(figsize=(7, 1.6 + 0.35 * len(bounds)), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = range(len(bounds))
    at_most = [each["without_noise"] for each in bounds]
    axes.barh(places, at_most, color="lightgrey", label="a run without noise would show")
    axes.barh(places, [each["epsilon"] for each in bounds], height=0.4, label="lower bound")
    if claimed is not None:
        axes.axvline(claimed, linestyle="--", color="black", label="claim")
    labels = [f"{e['attack']}, {e['assumes']}, {e['confidence']:.0%}" for e in bounds]
    axes.set_yticks(places, labels)
    axes.set_xlabel(f"epsilon at delta {result['delta']:g}")
    axes.set_title(f"Audit with {result['canaries']} canaries", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    run_cli(main)
