"""Audit the training run empirically: does it leak more than it claims?

    python -m privacy_checks.audit --json audit.json

Runs the whole of train.py on a tiny model, on the CPU, with gradient canaries: each is in the
data with probability 1/2, and before clipping its example's gradient is pushed far along a
coordinate of its own. What the optimizer is given says who was in; lower bounds on epsilon follow
from how well it does (Nasr et al. 2023, Steinke et al. 2023, Mahloujifar et al. 2024). It passes
if the best of them is at most the claimed epsilon, and at least 0.6 of it, or the audit would
have no power. Sums over steps cannot show a bad sampler or noise that repeats, so the batches and
the noise of that run, and of a second one in another process, are tested apart. All randomness is
real, so a sound run fails once in a thousand times. --break shows that a broken mechanism is
caught. Exit code 0 if everything passes, else 1.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from privacy_checks import randomness
from privacy_checks.estimators import correct_guesses, gaussian_pair, gdp, one_run, one_run_f_dp
from privacy_checks.observed_run import NUM_PARAMETERS, Observation, observe, save_tiny_model
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.command_line.parser import make_parser, positive_float, positive_int
from utils.dp_utils import PerExampleGradients, add_noise
from utils.files import write_json
from utils.privacy.accounting import SampledGaussian, compute_epsilon
from utils.privacy.ledger import LEDGER_FILE, read_plan
from utils.privacy.plan import PrivacyPlan
from utils.runs.batching import cut_microbatches, shuffled_batch
from utils.secure_random import SecureRandom, grid_spacing

BREAKS = {
    "noise_half": "half of the noise that is accounted for",
    "clip_double": "every example clipped to twice the clip norm",
    "no_clip": "no clipping",
    "reuse_noise": "the same noise in every step",
    "shuffle": "shuffled epochs in place of Poisson samples",
}
CONFIDENCE = 0.999
POWER = 0.6
# Each test of the randomness raises a false alarm this often.
FALSE_ALARM = 1e-5
CLIP_NORM = 1.0
# Length of a canary's push over the clip norm: beside it the example's own gradient is nothing.
PUSH = 1e7
# Rounding of float32, and the examples' own gradients.
CLIP_TOLERANCE = 1e-3
# Scores are 1 on average for a canary that was in, and 0 for another.
THRESHOLDS = np.linspace(-0.5, 1.5, 9)
# The one-run estimators guess the clearest fifth of the canaries.
GUESSED = 5
# The second run: Poisson samples of a fifth of the examples.
SAMPLED = {"examples": 100, "batch": 20, "steps": 100, "noise_multiplier": 1.0}


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Run:
    """An observed run, its plan and its own claim."""

    plan: PrivacyPlan
    seen: Observation
    report: dict

    @property
    def noised_sums(self) -> np.ndarray:
        """float64 [steps, parameters], as the optimizer saw them."""
        return np.array(self.seen.gradients) * self.plan.expected_batch_size

    @property
    def noised_once(self) -> bool:
        """Whether noise was added once for every update."""
        return len(self.seen.clipped_sums) == len(self.seen.gradients)

    @property
    def noise(self) -> np.ndarray:
        """float64 [steps, parameters], in units of the noise that the plan accounts for."""
        deviation = self.plan.noise_multiplier * self.plan.clip_norm
        return (self.noised_sums - np.array(self.seen.clipped_sums)) / deviation


def build_parser() -> argparse.ArgumentParser:
    """The command line of the audit."""
    parser = make_parser(__doc__)
    parser.add_argument("--canaries", type=positive_int, default=4000, help="in and out together")
    parser.add_argument("--steps", type=positive_int, default=16, help="logical steps")
    parser.add_argument("--noise_multiplier", type=positive_float, default=4.0, help="sigma")
    parser.add_argument("--delta", type=positive_float, default=1e-5, help="of the claim")
    parser.add_argument(
        "--break", dest="broken", choices=BREAKS, help="audit this broken mechanism"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write this")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 100 <= args.canaries <= NUM_PARAMETERS:
        raise UsageError(
            f"--canaries {args.canaries}: must be between 100 and {NUM_PARAMETERS}, one for each "
            "parameter of the tiny model's adapter at most"
        )
    began = time.monotonic()
    # The second run is in a process of its own, so that its keys come from another start.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        second = pool.submit(sampled_run, args.broken)
        inside, run = canary_run(
            args.canaries, args.steps, args.noise_multiplier, args.delta, args.broken
        )
        second = second.result()
    result = judge(inside, run, second)
    result |= {"broken": args.broken, "seconds": round(time.monotonic() - began, 1)}
    print(as_text(result))
    if args.json:
        if args.json.exists():
            say(f"{args.json} is replaced")
        write_json(args.json, result)
    return EXIT_OK if result["passed"] else EXIT_FAILED


# ------------------------------------------------------------------------ the runs


def canary_run(
    canaries: int, steps: int, noise_multiplier: float, delta: float, broken: str | None = None
) -> tuple[np.ndarray, Run]:
    """Train on the canaries that a fair coin put in, all of them in every step.

    Returns:
        bool [canaries], which were in, and the run.
    """
    inside = np.zeros(canaries, dtype=bool)
    inside[SecureRandom().bernoulli_indices(1, 2, canaries)] = True
    coordinates = canary_coordinates(canaries)[inside]
    claim = compute_epsilon([SampledGaussian(1.0, noise_multiplier, steps)], delta).upper
    run = _train(
        len(coordinates), len(coordinates), steps, noise_multiplier, claim, delta, broken,
        coordinates,
    )  # fmt: skip
    return inside, run


def sampled_run(broken: str | None = None) -> Run:
    """Train without canaries on Poisson samples, for tests of the batches and of the noise."""
    return _train(
        SAMPLED["examples"], SAMPLED["batch"], SAMPLED["steps"], SAMPLED["noise_multiplier"],
        1e3, 1e-5, broken,
    )  # fmt: skip


def canary_coordinates(canaries: int) -> np.ndarray:
    """int64 [canaries]: a coordinate for each, spread evenly over all tensors."""
    return np.arange(canaries) * NUM_PARAMETERS // canaries


def _train(
    examples: int,
    batch: int,
    steps: int,
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    broken: str | None,
    coordinates: np.ndarray | None = None,
) -> Run:
    torch.set_num_threads(1)  # a tiny model's threads would wait for one another
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        rows = [json.dumps({"instruction": "canary"})] * examples
        (folder / "canaries.jsonl").write_text("\n".join(rows) + "\n")
        argv = [
            f"--dataset_name={folder / 'canaries.jsonl'}", f"--model_name={folder / 'model'}",
            f"--output_dir={folder}", "--job_sess=audited", "--prompt_style=uncond_generation",
            "--max_seq_len=8", "--perdevice_bs=500", f"--eps={epsilon!r}", f"--delta={delta!r}",
            f"--clip={CLIP_NORM}", f"--noise_multiplier={noise_multiplier!r}",
            f"--total_bs={batch}", f"--num_epochs={steps * batch / examples!r}",
        ]  # fmt: skip
        seen = observe(argv, **_broken(broken), **_canaries(coordinates, broken))
        report = json.loads((folder / "audited" / "privacy_report.json").read_text())
        return Run(read_plan(folder / "audited" / LEDGER_FILE), seen, report)


def _canaries(coordinates: np.ndarray | None, broken: str | None) -> dict:
    """Stand-ins for names in `train` that push each example's gradient before it is clipped."""
    microbatches = deque()
    clip_factor = {"clip_double": 2.0, "no_clip": math.inf}.get(broken, 1.0)

    def cut_and_remember(*args):
        ranks = cut_microbatches(*args)
        microbatches.extend(ranks[0])
        return ranks

    class PushedGradients(PerExampleGradients):
        def add_clipped_sum(self, total, clip_norm, clip_function):
            examples = microbatches.popleft()
            if coordinates is not None:
                self._push(torch.from_numpy(coordinates[examples]))
            return super().add_clipped_sum(total, clip_norm * clip_factor, clip_function)

        def _push(self, coordinates):
            offset = 0
            for name, tensor in self.parameters.items():
                ours = (coordinates >= offset) & (coordinates < offset + tensor.numel())
                examples = ours.nonzero().squeeze(1)
                layer = self._captured[name]  # instantiated, as eight tokens at a rank of 8 are
                layer.gradients[examples, coordinates[examples] - offset] += PUSH * CLIP_NORM
                layer.norms = torch.linalg.vector_norm(layer.gradients, dim=1)
                offset += tensor.numel()

    return {"PerExampleGradients": PushedGradients, "cut_microbatches": cut_and_remember}


def _broken(name: str | None) -> dict:
    """Stand-ins for names in `train` that break the mechanism; clipping breaks in `_canaries`."""

    def half(clipped_sum, noise_multiplier, *rest):
        return add_noise(clipped_sum, noise_multiplier / 2, *rest)

    def same(clipped_sum, noise_multiplier, clip_norm, _random):
        random = SecureRandom.insecure_fixed(0, "noise")
        return add_noise(clipped_sum, noise_multiplier, clip_norm, random)

    step = itertools.count()

    def shuffled(num_examples, batch_size, _random):
        return shuffled_batch(num_examples, batch_size, seed=0, step=next(step))

    changes = {
        "noise_half": {"add_noise": half},
        "reuse_noise": {"add_noise": same},
        "shuffle": {"poisson_batch": shuffled},
    }
    return changes.get(name, {})


# ------------------------------------------------------------------------ the verdict


def judge(inside: np.ndarray, run: Run, second: Run) -> dict:
    """Bounds, checks and verdict.

    Args:
        inside: bool [canaries], which were in the data of `run`.
        run: of `canary_run`.
        second: of `sampled_run`, in another process.

    Returns:
        A JSON-able dict with `claimed_epsilon`, `lower_bounds`, `passed` and `checks`.
    """
    claim, delta = run.report["epsilon"]["upper"], run.plan.delta
    scores = run.noised_sums[:, canary_coordinates(len(inside))].mean(axis=0) / run.plan.clip_norm
    groups = scores[inside], scores[~inside]
    guesses = len(inside) // GUESSED
    one_run_arguments = (correct_guesses(*groups, guesses), guesses, len(inside))
    bounds = {
        "gaussian_pair": gaussian_pair(*groups, delta, CONFIDENCE),
        "gdp": gdp(*groups, THRESHOLDS, delta, CONFIDENCE),
        "one_run": one_run(*one_run_arguments, delta, CONFIDENCE),
        "one_run_f_dp": one_run_f_dp(*one_run_arguments, delta, CONFIDENCE),
    }
    best = max(bounds, key=bounds.get)
    found = f"{bounds[best]:.3f} ({best})"
    checks = [
        Check("claim", bounds[best] <= claim, f"lower bound {found}, at most {claim:.3f}"),
        Check("power", bounds[best] >= POWER * claim, f"{found}, at least {POWER * claim:.3f}"),
        *_mechanism_checks(inside, run),
        *(_noise_checks(run, second) if run.noised_once and second.noised_once else []),
        *_sampler_checks(second),
    ]
    return {
        "claimed_epsilon": claim,
        "delta": delta,
        "confidence": CONFIDENCE,
        "canaries": len(inside),
        "canaries_inside": int(inside.sum()),
        "sampling_rate": run.plan.sampling_rate,
        "noise_multiplier": run.plan.noise_multiplier,
        "steps": run.plan.steps,
        "lower_bounds": bounds,
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _mechanism_checks(inside: np.ndarray, run: Run) -> list[Check]:
    """What holds exactly, in every run."""
    sums = np.array(run.seen.clipped_sums).reshape(-1, NUM_PARAMETERS)
    pushed = sums[:, canary_coordinates(len(inside))[inside]]
    move = float(np.abs(pushed).max(initial=0.0)) / run.plan.clip_norm
    updates, accounted = len(run.seen.gradients), run.report["steps_taken"]
    steps = f"{updates} updates, {len(sums)} with noise, {accounted} accounted for"
    cells = run.noised_sums / grid_spacing(run.plan.noise_multiplier * run.plan.clip_norm)
    off_grid = float(np.abs(cells - cells.round()).max())
    return [
        Check("clip", move <= 1 + CLIP_TOLERANCE, f"an example moved the sum by {move:.6g} C"),
        Check("steps", updates == len(sums) == accounted, steps),
        Check("grid", off_grid < 1e-4, f"noised sums are {off_grid:.1g} of a cell off the grid"),
    ]


def _noise_checks(run: Run, second: Run) -> list[Check]:
    return [
        _statistical("noise scale", randomness.scale_p_value(run.noise)),
        _statistical("noise between and within steps", randomness.repetition_p_value(run.noise)),
        _statistical(
            "noise between process starts",
            randomness.repetition_p_value(run.noise, second.noise[: run.plan.steps]),
        ),
    ]


def _sampler_checks(second: Run) -> list[Check]:
    taken = np.zeros((len(second.seen.batches), second.plan.num_examples), dtype=bool)
    for row, batch in zip(taken, second.seen.batches):
        row[batch] = True
    rate = second.plan.sampling_rate
    return [
        _statistical("sampler, batch sizes", randomness.batch_size_p_value(taken, rate)),
        _statistical("sampler, counts of examples", randomness.count_p_value(taken, rate)),
        _statistical("sampler, adjacent batches", randomness.adjacent_p_value(taken, rate)),
    ]


def _statistical(name: str, p_value: float) -> Check:
    return Check(name, p_value >= FALSE_ALARM, f"p-value {p_value:.2g}, at least {FALSE_ALARM:g}")


def as_text(result: dict) -> str:
    """The result for a terminal."""
    broken = result["broken"]
    lines = [
        f"Audit of train.py with {result['canaries']} canaries, {result['canaries_inside']} of "
        f"them in the data: {result['steps']} steps, sampling rate {result['sampling_rate']:g}, "
        f"noise multiplier {result['noise_multiplier']:g}.",
        *([f"BROKEN ON PURPOSE: {BREAKS[broken]}."] if broken else []),
        f"Claimed epsilon {result['claimed_epsilon']:.3f} at delta {result['delta']:g}.",
        f"Lower bounds at confidence {result['confidence']:.1%}:",
        *(f"  {name:<14} {bound:.3f}" for name, bound in result["lower_bounds"].items()),
        *(
            f"{'ok    ' if check['passed'] else 'FAILED'} {check['name']}: {check['detail']}"
            for check in result["checks"]
        ),
        f"{'PASSED' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
