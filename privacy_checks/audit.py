"""Audit the training run empirically: does it leak more than it claims?

    python -m privacy_checks.audit --json audit.json

Runs the whole of train.py on a tiny model, on the CPU, with gradient canaries: each is in the
data with probability 1/2, and before clipping its example's gradient is pushed far along a
coordinate of its own. What the optimizer is given says who was in; lower bounds on epsilon follow
from how well it does (Nasr et al. 2023, Steinke et al. 2023, Mahloujifar et al. 2024). It passes
if the best of them is at most the claimed epsilon, and at least 0.6 of it, or the audit would
have no power. Sums over steps cannot show a bad sampler or noise that repeats, so the batches and
the noise of that run, and of a second one in another process, are tested apart. Nor can they show
that one example changes how others are computed, so a short replay of a model of 576 features in
bfloat16 leaves out rows and asks that no other row's gradient moves. All other randomness is real,
so a sound run fails once in a thousand times. With --unit each canary is a person with four
identical rows, in a run that protects persons; another run on the same data, with the same noise,
protects rows, and shows that a person is lost in it. With --bands noise is correlated over steps,
of which there are as many times more, and the attack undoes what of it cancels. --break shows that
a broken mechanism is caught. Exit code 0 if everything passes, else 1.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from utils.command_line.parser import answer_early, flag, positive_float, positive_int, read_flags

# The mechanisms of `DESCRIPTIONS`, which take seconds to import.
BROKEN = (
    "noise_half", "clip_double", "no_clip", "reuse_noise", "shuffle", "cap_ignored",
    "mean_by_row_clip", "dropout_by_place", "rope_state", "bf16_free_shapes",
    "correlation_kept_secretly_short",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the audit."""

    unit: bool = flag("canaries are persons of several rows, in a run that protects them", False)
    canaries: int | None = flag(
        "in and out together (default 4000; 2000 with --unit)", type=positive_int
    )
    steps: int | None = flag(
        "logical steps (default 16 for each of --bands; 4 with --unit)",
        type=positive_int,
    )
    noise_multiplier: float | None = flag("sigma (default 4; 2 with --unit)", type=positive_float)
    bands: int = flag("of correlated noise, see --bands of train.py; 1: white noise", 1)
    delta: float = flag("of the claim", 1e-5)
    broken: str | None = flag("audit this broken mechanism", name="--break", choices=BROKEN)
    json: Path | None = flag("also write this", type=Path, metavar="FILE")


answer_early(__name__, Settings, __doc__)

import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from unittest import mock

import numpy as np
import torch

from privacy_checks import randomness
from privacy_checks.estimators import correct_guesses, gaussian_pair, gdp, one_run, one_run_f_dp
from privacy_checks.observed_run import NUM_PARAMETERS, Observation, observe, save_tiny_model
from privacy_checks.persons import BREAKS as BREAKS_OF_PERSONS
from privacy_checks.persons import CANARY_CAP, CANARY_ROWS, of_persons, save_rows, unit_flags
from privacy_checks.replay import replay_wide
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.dp_utils import _Instantiated
from utils.files import write_json
from utils.privacy.accounting import SampledGaussian, compute_epsilon
from utils.privacy.ledger import LEDGER_FILE, read_plan
from utils.privacy.mechanism import Private, shuffled_batch
from utils.privacy.plan import PrivacyPlan
from utils.runs.batching import Shapes
from utils.runs.probe import Numerics
from utils.secure_random import SecureRandom, grid_spacing

CONFIDENCE = 0.999
POWER = 0.6
# Each test of the randomness raises a false alarm this often.
FALSE_ALARM = 1e-5
CLIP_NORM = 1.0
# Length of a canary's push over the clip norm: against it the example's own gradient is nothing.
PUSH = 1e7
# Rounding of float32, and the examples' own gradients.
CLIP_TOLERANCE = 1e-3
# Rounding of float32.
UPDATE_TOLERANCE = 1e-6
# Scores are 1 on average for a canary that was in, and 0 for another.
THRESHOLDS = np.linspace(-0.5, 1.5, 9)
# The one-run estimators guess the clearest fifth of the canaries.
GUESSED = 5
# Rows that the replay leaves out: one of a middle length, and the longest.
REPLAYED_STEPS = 2
# The second run: Poisson samples of a fifth of the examples, or half of that with bands.
SAMPLED_EXAMPLES, SAMPLED_BATCH, SAMPLED_STEPS, SAMPLED_NOISE = 100, 20, 100, 1.0


# Canaries, steps in which each takes part, and sigma: with and without --unit, where a canary has
# several rows.
SIZES = {False: (4000, 16, 4.0), True: (2000, 4, 2.0)}


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
    def updates(self) -> np.ndarray:
        """float64 [steps, parameters], what the optimizer was given, as sums."""
        return np.array(self.seen.updates, dtype=np.float64) * self.plan.expected_batch_size

    @property
    def released(self) -> np.ndarray:
        """float64 [releases, parameters]."""
        return np.array(self.seen.released).reshape(-1, NUM_PARAMETERS)

    @property
    def released_once(self) -> bool:
        """Whether there was one release for every update."""
        return len(self.seen.released) == len(self.seen.updates)

    @property
    def noise(self) -> np.ndarray:
        """float64 [releases, parameters]: what the noise that the plan accounts for is made of."""
        deviation = self.plan.noise_multiplier * self.plan.clip_norm
        noise = (self.released - np.array(self.seen.clipped_sums)) / deviation
        return randomness.whitened(noise, self.plan.coefficients)


# ------------------------------------------------------------------------ the mechanisms


class Pushed(Private):
    """Pushes each example's gradient far along a coordinate of its own before it is clipped.

    Attributes:
        coordinates: int64 [examples].
    """

    coordinates: np.ndarray

    def add(self, total: torch.Tensor) -> torch.Tensor:
        coordinates = torch.from_numpy(self.coordinates[self._captured])
        offset = 0
        for name, tensor in self.gradients.parameters.items():
            ours = (coordinates >= offset) & (coordinates < offset + tensor.numel())
            examples = ours.nonzero().squeeze(1)
            # Instantiated, as eight tokens at a rank of 8 are.
            layer = self.gradients._captured[name]
            assert isinstance(layer, _Instantiated)
            layer.gradients[examples, coordinates[examples] - offset] += PUSH * CLIP_NORM
            layer.norms = torch.linalg.vector_norm(layer.gradients, dim=1)
            offset += tensor.numel()
        return super().add(total)


class Broken(Private):
    """A mechanism that does in part as another plan says."""

    @contextmanager
    def _as_if(self, plan: PrivacyPlan) -> Iterator[None]:
        honest, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = honest


class NoiseHalf(Broken):
    """Half of the noise that is accounted for."""

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        plan = replace(self.plan, noise_multiplier=self.plan.noise_multiplier / 2)
        with self._as_if(plan):
            return super().release(total, step)


class ClipDouble(Broken):
    """Every example clipped to twice the clip norm."""

    def add(self, total: torch.Tensor) -> torch.Tensor:
        with self._as_if(replace(self.plan, clip_norm=2 * self.plan.clip_norm)):
            return super().add(total)


class NoClip(Broken):
    """No clipping."""

    def add(self, total: torch.Tensor) -> torch.Tensor:
        with self._as_if(replace(self.plan, clip_norm=math.inf)):
            return super().add(total)


class ReuseNoise(Private):
    """The same noise in every step."""

    def _random(self, stream: str, step: int) -> SecureRandom:
        if stream == "noise":
            return SecureRandom.insecure_fixed(0, stream)
        return super()._random(stream, step)


class Shuffle(Private):
    """Shuffled epochs in place of Poisson samples."""

    def draw(self, step: int) -> np.ndarray:
        return shuffled_batch(self.num_examples, self.divisor, seed=0, step=step)


class CorrelationKeptSecretlyShort(Private):
    """Everybody takes part twice as often as the noise has bands and epsilon counts."""

    def draw(self, step: int) -> np.ndarray:
        others = super().draw(step + self.plan.bands // 2)
        return np.sort(np.concatenate([super().draw(step), others]))


class DropoutByPlace(Private):
    """Dropout whose masks follow an example's place in its microbatch."""

    def capture(
        self, examples: np.ndarray, rows: int | None = None
    ) -> AbstractContextManager[None]:
        captured = super().capture(examples, rows)
        self._masks.rows = np.arange(len(self._masks.rows))
        return captured


@dataclass(frozen=True)
class Coupling:
    """A way for examples to change how others are computed, as the replay alone shows it.

    Attributes:
        description: in a line.
        changes: subclasses of `Private`.
        flags: of train.py.
        model: changes of the model's configuration.
        patches: what stands in for what, by its name.
    """

    description: str
    changes: tuple[type[Private], ...] = ()
    flags: tuple[str, ...] = ()
    model: dict[str, object] = field(default_factory=dict)
    patches: dict[str, object] = field(default_factory=dict)


def _no_shapes(*_) -> tuple[Shapes | None, Numerics]:
    return None, Numerics(0.0, "nothing")


BREAKS: dict[str, type[Private]] = {
    "noise_half": NoiseHalf, "clip_double": ClipDouble, "no_clip": NoClip,
    "reuse_noise": ReuseNoise, "shuffle": Shuffle,
    "correlation_kept_secretly_short": CorrelationKeptSecretlyShort,
}  # fmt: skip
BREAKS |= BREAKS_OF_PERSONS
COUPLINGS = {
    "dropout_by_place": Coupling(
        str(DropoutByPlace.__doc__), (DropoutByPlace,), ("--lora_dropout=0.1",)
    ),
    "rope_state": Coupling(
        "RoPE that follows the longest row so far.",
        model={
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
        patches={
            "utils.models.independence._require_fixed_rope": lambda *_: None,
            "utils.runs.probe.LARGEST_DIFFERENCE": math.inf,
        },
    ),
    "bf16_free_shapes": Coupling(
        "bfloat16, in microbatches whose shapes follow the rows that were drawn.",
        patches={"train.probed": _no_shapes},
    ),
}
DESCRIPTIONS = {name: str(broken.__doc__) for name, broken in BREAKS.items()} | {
    name: coupling.description for name, coupling in COUPLINGS.items()
}


# ------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    canaries, steps, noise_multiplier = sizes_of(settings)
    if settings.broken in BREAKS_OF_PERSONS and not settings.unit:
        raise UsageError(f"--break {settings.broken} needs --unit: it breaks what protects persons")
    if settings.bands not in (1, 2, 4, 5):
        raise UsageError(f"--bands {settings.bands}: must be 1, 2, 4 or 5")
    if settings.bands > 1 and settings.unit:
        raise UsageError(f"--bands {settings.bands} does not go with --unit; leave one of them out")
    if settings.broken == "correlation_kept_secretly_short" and settings.bands == 1:
        raise UsageError(f"--break {settings.broken} needs --bands 2 or more: white noise has none")
    if steps % settings.bands:
        raise UsageError(
            f"--steps {steps}: must be a multiple of --bands {settings.bands}, so that all "
            "canaries take part as often as epsilon counts"
        )
    if not 100 <= canaries <= NUM_PARAMETERS:
        raise UsageError(
            f"--canaries {canaries}: must be between 100 and {NUM_PARAMETERS}, one for "
            "each parameter of the tiny model's adapter at most"
        )
    began = time.monotonic()
    # The second run is in a process of its own, so that its keys come from another start.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        sampled = pool.submit(sampled_run, settings.broken, settings.unit, settings.bands)
        sizes = (canaries, steps, noise_multiplier, settings.delta)
        of_rows = pool.submit(canary_run, *sizes, None, ROWS_OF_PERSONS) if settings.unit else None
        protects = PERSONS if settings.unit else EXAMPLES
        inside, run = canary_run(*sizes, settings.broken, protects, settings.bands)
        second = sampled.result()
        others = others_move(settings.broken)
        if of_rows:
            result = judge_persons(inside, run, second, others, *of_rows.result())
        else:
            result = judge(inside, run, second, others)
    result |= {"broken": settings.broken, "seconds": round(time.monotonic() - began, 1)}
    print(as_text(result))
    if settings.json:
        if settings.json.exists():
            say(f"{settings.json} is replaced")
        write_json(settings.json, result)
    return EXIT_OK if result["passed"] else EXIT_FAILED


def sizes_of(settings: Settings) -> tuple[int, int, float]:
    """Canaries, steps and sigma; those that go with the kind of canary where they are not given."""
    canaries, steps, sigma = SIZES[settings.unit]
    return (
        canaries if settings.canaries is None else settings.canaries,
        steps * settings.bands if settings.steps is None else settings.steps,
        sigma if settings.noise_multiplier is None else settings.noise_multiplier,
    )


# ------------------------------------------------------------------------ the runs

# What is a canary, and what does its run protect: an example, that; a person with several rows,
# that; or such a person, one row.
EXAMPLES, PERSONS, ROWS_OF_PERSONS = "examples", "persons", "rows of persons"


def canary_run(
    canaries: int,
    steps: int,
    noise_multiplier: float,
    delta: float,
    broken: str | None = None,
    protects: str = EXAMPLES,
    bands: int = 1,
) -> tuple[np.ndarray, Run]:
    """Train on the canaries that a fair coin put in, all of them, or of a group, in every step.

    Args:
        protects: EXAMPLES, PERSONS or ROWS_OF_PERSONS.
        bands: of the noise, for EXAMPLES.

    Returns:
        bool [canaries], which were in, and the run.
    """
    inside = np.zeros(canaries, dtype=bool)
    inside[SecureRandom().bernoulli_indices(1, 2, canaries)] = True
    coordinates = canary_coordinates(canaries)[inside]
    times = -(-steps // bands)
    claim = compute_epsilon([SampledGaussian(1.0, noise_multiplier, times)], delta).upper
    rows = np.repeat(coordinates, 1 if protects == EXAMPLES else CANARY_ROWS)
    drawn = len(rows) if protects == ROWS_OF_PERSONS else len(coordinates)
    run = _train(
        drawn, drawn // bands, steps, noise_multiplier, claim, delta, broken, rows,
        protects == PERSONS, bands,
    )  # fmt: skip
    return inside, run


def sampled_run(broken: str | None = None, unit: bool = False, bands: int = 1) -> Run:
    """Train without canaries on Poisson samples, for tests of the batches and of the noise."""
    batch = SAMPLED_BATCH if bands == 1 else SAMPLED_BATCH // 2
    return _train(
        SAMPLED_EXAMPLES, batch, SAMPLED_STEPS, SAMPLED_NOISE, 1e3, 1e-5, broken, unit=unit,
        bands=bands,
    )  # fmt: skip


def others_move(broken: str | None = None) -> float:
    """How far leaving out a row moves all others in bfloat16, over the clip norm, at most."""
    coupling = COUPLINGS.get(broken or "", Coupling("none"))
    with ExitStack() as stack:
        for name, replacement in coupling.patches.items():
            stack.enter_context(mock.patch(name, replacement))
        moves = replay_wide(
            "bfloat16",
            steps=REPLAYED_STEPS,
            changes=coupling.changes,
            flags=coupling.flags,
            config=coupling.model,
        )
    return max(moves.others)


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
    unit: bool = False,
    bands: int = 1,
) -> Run:
    """Train on rows, one for each of the coordinates or, without them, what is drawn."""
    more = unit_flags(CANARY_CAP) if unit else []
    text: Callable[[], str] = lambda: "canary"  # noqa: E731
    if bands > 1:
        more = ["--noise=banded", f"--bands={bands}"]
        text = map(str, count()).__next__  # equal rows would be of one group
    drawn_rows = examples * (CANARY_ROWS if unit else 1)
    rows = drawn_rows if coordinates is None else len(coordinates)
    torch.set_num_threads(1)  # a tiny model's threads would wait for one another
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        save_rows(folder / "canaries.jsonl", np.arange(rows) // CANARY_ROWS, text)
        argv = [
            f"--dataset_name={folder / 'canaries.jsonl'}", f"--model_name={folder / 'model'}",
            f"--output_dir={folder}", "--job_sess=audited", "--prompt_style=uncond_generation",
            "--max_seq_len=8", "--perdevice_bs=500", f"--eps={epsilon!r}", f"--delta={delta!r}",
            f"--clip={CLIP_NORM}", f"--noise_multiplier={noise_multiplier!r}",
            f"--total_bs={batch}", f"--num_epochs={(steps + 0.5) * batch / examples!r}", *more,
        ]  # fmt: skip
        changes = [BREAKS[broken]] if broken in BREAKS else []
        if coordinates is None:
            seen = observe(argv, *changes)
        else:
            seen = observe(argv, Pushed, *changes, coordinates=coordinates)
        report = json.loads((folder / "audited" / "privacy_report.json").read_text())
        return Run(read_plan(folder / "audited" / LEDGER_FILE), seen, report)


# ------------------------------------------------------------------------ the verdict


def judge(inside: np.ndarray, run: Run, second: Run, others: float) -> dict:
    """Bounds, checks and verdict.

    Args:
        inside: bool [canaries], which were in the data of `run`.
        run: of `canary_run`.
        second: of `sampled_run`, in another process.
        others: of `others_move`.

    Returns:
        A JSON-able dict with `claimed_epsilon`, `lower_bounds`, `passed` and `checks`.
    """
    claim, delta = run.report["epsilon"]["upper"], run.plan.delta
    bounds = _lower_bounds(inside, run)
    best = max(bounds, key=lambda name: bounds[name])
    found = f"{bounds[best]:.3f} ({best})"
    checks = [
        Check("claim", bounds[best] <= claim, f"lower bound {found}, at most {claim:.3f}"),
        Check("power", bounds[best] >= POWER * claim, f"{found}, at least {POWER * claim:.3f}"),
        *_mechanism_checks(inside, run),
        *(_noise_checks(run, second) if run.released_once and second.released_once else []),
        *_sampler_checks(second),
        Check("others", others == 0, f"without a row, the others moved by {others:.2g} C"),
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


def judge_persons(
    inside: np.ndarray,
    run: Run,
    second: Run,
    others: float,
    inside_rows: np.ndarray,
    of_rows: Run,
) -> dict:
    """`judge` where the canaries are persons, and what a run that protects rows does to them.

    Args:
        inside, run, second, others: see `judge`; of runs that protect persons.
        inside_rows, of_rows: of `canary_run` with ROWS_OF_PERSONS.
    """
    taken = [of_persons(each.seen.batches) for each in (run, second)]
    persons, _ = taken[1]
    of_second = replace(second, seen=replace(second.seen, batches=persons))
    result = judge(inside, run, of_second, others)
    claim = of_rows.report["epsilon"]["upper"]
    bounds = _lower_bounds(inside_rows, of_rows, CANARY_ROWS)
    lost, most = max(bounds.values()), max(rows for _, rows in taken)
    checks = [
        Check("cap", most <= CANARY_CAP, f"{most} rows of a person in a step, of {CANARY_CAP}"),
        Check(
            "rows are no persons",
            lost > CANARY_ROWS * claim,
            f"where a row has epsilon {claim:.3f}, a person of {CANARY_ROWS} rows has at least "
            f"{lost:.3f}, above {CANARY_ROWS} x {claim:.3f} = {CANARY_ROWS * claim:.3f}",
        ),
    ]
    return result | {
        "rows_of_a_person": CANARY_ROWS,
        "claimed_epsilon_of_a_row": claim,
        "lower_bounds_where_rows_are_protected": bounds,
        "passed": result["passed"] and all(check.passed for check in checks),
        "checks": result["checks"] + [asdict(check) for check in checks],
    }


def _lower_bounds(inside: np.ndarray, run: Run, rows: int = 1) -> dict[str, float]:
    """Lower bounds on epsilon of a canary that so many rows push, by the name of the estimator."""
    delta, push = run.plan.delta, rows * run.plan.clip_norm
    scores = _scores(inside, run) / push
    groups = scores[inside], scores[~inside]
    guesses = len(inside) // GUESSED
    correct = correct_guesses(*groups, guesses // 2, guesses // 2)
    one_run_arguments = (correct, guesses, len(inside))
    return {
        "gaussian_pair": gaussian_pair(*groups, delta, CONFIDENCE),
        "gdp": gdp(*groups, THRESHOLDS, delta, CONFIDENCE),
        "one_run": one_run(*one_run_arguments, delta, CONFIDENCE),
        "one_run_f_dp": one_run_f_dp(*one_run_arguments, delta, CONFIDENCE),
    }


def _scores(inside: np.ndarray, run: Run) -> np.ndarray:
    """float64 [canaries], 1 on average for a canary whose push of 1 was in, and 0 for another.

    What was released is made C G + z, of which a canary moves a column of C for each of its steps:
    its score is the part along these columns. With white noise that is the mean over steps.
    """
    plan = run.plan
    released = randomness.whitened(
        run.updates[:, canary_coordinates(len(inside))], plan.coefficients
    )
    columns = randomness.whitened(np.eye(len(released)), plan.coefficients)
    # Whoever was not in was of no group, so any will do.
    groups = np.arange(len(inside)) % plan.bands
    if plan.bands > 1:
        of_rows = groups[inside]
        for step, batch in reversed(list(enumerate(run.seen.batches))):
            of_rows[batch] = step % plan.bands
        groups[inside] = of_rows
    steps = np.equal.outer(np.arange(len(released)) % plan.bands, groups)
    weights = columns @ steps  # [steps, canaries]
    return (weights * released).sum(axis=0) / (weights**2).sum(axis=0)


def _mechanism_checks(inside: np.ndarray, run: Run) -> list[Check]:
    """What holds exactly, in every run."""
    sums = np.array(run.seen.clipped_sums).reshape(-1, NUM_PARAMETERS)
    pushed = sums[:, canary_coordinates(len(inside))[inside]]
    move = float(np.abs(pushed).max(initial=0.0)) / run.plan.clip_norm
    updates, accounted = len(run.seen.updates), run.report["steps_taken"]
    steps = f"{updates} updates, {len(sums)} releases, {accounted} accounted for"
    cells = run.released / grid_spacing(run.plan.noise_multiplier * run.plan.clip_norm)
    off_grid = float(np.abs(cells - cells.round()).max(initial=0.0))
    checks = [
        Check("clip", move <= 1 + CLIP_TOLERANCE, f"an example moved the sum by {move:.6g} C"),
        Check("steps", updates == len(sums) == accounted, steps),
        Check("grid", off_grid < 1e-4, f"released sums are {off_grid:.1g} of a cell off the grid"),
    ]
    if run.released_once:
        other = np.abs(run.updates - run.released) / np.maximum(1.0, np.abs(run.released))
        gap = f"the optimizer was given what was released, to {other.max():.1g}"
        checks.append(Check("update", float(other.max()) < UPDATE_TOLERANCE, gap))
    return checks


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
    plan = second.plan
    in_steps = np.zeros((len(second.seen.batches), plan.num_examples), dtype=bool)
    for row, batch in zip(in_steps, second.seen.batches):
        row[batch] = True
    # In a round each of the groups has its turn, and every row the step of its own.
    rounds = in_steps.reshape(-1, plan.bands, plan.num_examples)
    most = int(rounds.any(axis=0).sum(axis=0).max())
    separation = [Check("sampler, groups", most <= 1, f"a row was drawn from {most} groups")]
    taken = np.any(rounds, axis=1)
    rate = plan.bands * plan.sampling_rate
    return [
        *(separation if plan.bands > 1 else []),
        _statistical("sampler, batch sizes", randomness.batch_size_p_value(taken, rate)),
        _statistical("sampler, counts of examples", randomness.count_p_value(taken, rate)),
        _statistical("sampler, adjacent batches", randomness.adjacent_p_value(taken, rate)),
    ]


def _statistical(name: str, p_value: float) -> Check:
    return Check(name, p_value >= FALSE_ALARM, f"p-value {p_value:.2g}, at least {FALSE_ALARM:g}")


def as_text(result: dict) -> str:
    """The result for a terminal."""
    broken, rows = result["broken"], result.get("rows_of_a_person")
    kind = f"persons of {rows} rows as canaries" if rows else "canaries"
    lines = [
        f"Audit of train.py with {result['canaries']} {kind}, {result['canaries_inside']} of "
        f"them in the data: {result['steps']} steps, sampling rate {result['sampling_rate']:g}, "
        f"noise multiplier {result['noise_multiplier']:g}.",
        *([f"BROKEN ON PURPOSE: {DESCRIPTIONS[broken]}"] if broken else []),
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
