"""What a training step does to the data: who is drawn, what of them counts, what is released.

`Private` is the sampled Gaussian mechanism of a plan, and `Plain` what takes its place in a run
without privacy. The training loop calls the same methods of either and knows no difference. Every
constant that decides privacy comes from the plan.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.dp_utils import PerExampleGradients, add_noise
from utils.privacy.banded import CorrelatedNoise, groups_of
from utils.privacy.guarantee import NOT_PROBED, build_report
from utils.privacy.ledger import LEDGER_FILE, Ledger
from utils.privacy.plan import UNITS, PrivacyPlan
from utils.privacy.unit_sums import Units, UnitSums
from utils.row_dropout import RowMasks
from utils.secure_random import SecureRandom


def poisson_batch(num_examples: int, batch_size: int, random: SecureRandom) -> np.ndarray:
    """Take every example independently with probability batch_size / num_examples, exactly.

    Returns:
        int64 indices, ascending; possibly none.
    """
    return random.bernoulli_indices(batch_size, num_examples, num_examples)


def shuffled_batch(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The indices of one step of shuffled epochs (training without privacy), from public values.

    The epochs' permutations are laid end to end and cut every `batch_size`, so a step's batch
    depends on (seed, step) alone and a resumed run sees what an uninterrupted one would.

    Args:
        step: counts from 0.

    Returns:
        int64 [batch_size].
    """
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // num_examples, (last - 1) // num_examples + 1)
    order = np.concatenate(
        [np.random.default_rng((seed, epoch)).permutation(num_examples) for epoch in epochs]
    )
    start = first - epochs[0] * num_examples
    return order[start : start + batch_size]


class Mechanism(ABC):
    """The methods of `Private` and of `Plain`, in the order in which a step calls them.

    Attributes:
        num_examples: N, of which `draw` draws.
        divisor: the public constant that a released sum is divided by, the (expected) batch size.
        loss_normalization: what an example's summed loss is divided by, see `losses.normalise`.
        numerics: how far an example's gradient is its own on this machine, for the report.
    """

    num_examples: int
    divisor: int
    loss_normalization: str
    numerics: str = NOT_PROBED

    @abstractmethod
    def open(self, folder: Path) -> None:
        """Begin or continue the record of what is released; on the main process alone."""

    @abstractmethod
    def draw(self, step: int) -> np.ndarray:
        """Who takes part in step `step` (from 0): int64 indices. On the main process alone."""

    @abstractmethod
    def begin(self, step: int, rank: int) -> None:
        """Settle what else is random in step `step` of this process: its dropout masks."""

    def expect(self, examples: np.ndarray, num_ranks: int) -> list[np.ndarray] | None:
        """Learn what `draw` returned, on every process, before any of it passes.

        Returns:
            Parts of it, each of which has to pass as a whole on one of the processes, one part
            after the other; None where examples may pass in any order.
        """
        return None

    @abstractmethod
    def capture(
        self, examples: np.ndarray, rows: int | None = None
    ) -> AbstractContextManager[None]:
        """Wraps the one forward and backward pass of a microbatch.

        Args:
            examples: int64, its indices in the order of its rows.
            rows: those beyond the examples are empty; None for as many as examples.
        """

    @abstractmethod
    def add(self, total: torch.Tensor) -> torch.Tensor:
        """Add what the captured microbatch contributes to the step's sum, in place.

        Args:
            total: float32 [parameters].

        Returns:
            float32 [examples], norms of per-example gradients, none where nothing is clipped.
            Computed from private data without noise: for `private/` alone.
        """

    @abstractmethod
    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        """What of a step's sum, over all microbatches and processes, the optimizer may see.

        Called on every process; what the main process gets counts.
        """

    def rehearse_release(self, total: torch.Tensor) -> float:
        """Release a sum of nobody once, with all that `release` has in memory at its height.

        Nothing is on record.

        Returns:
            Seconds that `release` takes at most.
        """
        return 0.0

    @property
    def bytes_of_past_noise(self) -> int:
        """Of host memory, what this process keeps for the noise of steps to come."""
        return 0

    @abstractmethod
    def statistics(self, norms: Sequence[torch.Tensor]) -> dict:
        """What the norms that `add` returned in a step say: for `private/` alone."""

    @abstractmethod
    def report(self, steps_taken: int) -> dict:
        """The privacy report of a run whose model has taken so many steps."""

    @abstractmethod
    def describe(self) -> str:
        """The mechanism in a line."""

    @property
    def steps_recorded(self) -> int:
        """Steps on record, those that a crash lost included."""
        return 0

    @property
    def head(self) -> dict | None:
        """The end of the record, for a checkpoint to keep."""
        return None

    @property
    def adapter(self) -> str | None:
        """The hash of the adapter that the record ends with."""
        return None

    @abstractmethod
    def record_adapter(self, sha256: str) -> None:
        """End the record with the adapter that the run came to; see `Ledger.record_adapter`."""

    @abstractmethod
    def require_head(self, head: dict | None) -> None:
        """Raise a UsageError unless the record continues the one that had `head`."""

    @abstractmethod
    def close(self) -> None:
        """End the record."""


class Private(Mechanism):
    """Poisson samples, clipped sums, Gaussian noise: sampled Gaussian mechanisms in sequence.

    Guarantee: if an example's gradient depends on nothing but the example, the parameters and the
    step, then adding or removing one example moves the sum of all that `add` adds in a step by at
    most the plan's clip norm, and the sequence of what `release` returns costs what the plan's
    accountant says of `plan.events(plan.participations(steps))`. A row counts once: `add` refuses
    one that was not drawn, or is in the sum already. A step is on record before its noise is used.
    Keys are fresh at every process start, so a resumed run repeats neither noise nor draws, and
    the correlation of noise begins anew; who is in which group does not change.

    Args:
        plan: the source of every constant.
        gradients: of the model that is trained.
        masks: those of the model's dropout, see `row_dropout`.
        is_main: whether this is the process that draws, records and adds noise.
        units: whose each row is, for a plan that draws units; their rows then count for what is
            said of examples here.
        row_keys: uint64 [rows], what each row holds as a number, for a plan with bands: it decides
            the row's group, or with others of a unit the unit's.
        known_seed: for tests: all randomness follows from it, and there is no guarantee.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        gradients: PerExampleGradients,
        masks: RowMasks,
        units: Units | None = None,
        *,
        is_main: bool = True,
        row_keys: np.ndarray | None = None,
        known_seed: int | None = None,
    ):
        self.plan = plan
        self.gradients = gradients
        self.num_examples = plan.num_examples
        self.divisor = plan.expected_batch_size
        self.loss_normalization = plan.loss_normalization
        self._masks = masks
        self._is_main = is_main
        self._known_seed = known_seed
        self._streams = {name: SecureRandom() for name in ("sampling", "noise")}
        self._ledger: Ledger | None = None
        self._captured = np.zeros(0, dtype=np.int64)
        self._left: Counter[int] = Counter()
        assert (units is not None) == (plan.unit_sampling == UNITS)
        self._units = UnitSums(units) if units else None
        self._noise = CorrelatedNoise(plan.coefficients)
        assert (row_keys is not None) == (plan.bands > 1)
        self._groups = (
            None
            if row_keys is None
            else groups_of(row_keys, units.of_row if units else None, plan.bands)
        )

    @property
    def ledger(self) -> Ledger:
        """The record of this run's steps."""
        if self._ledger is None:
            raise RuntimeError("the ledger is not open: nothing may be released")
        return self._ledger

    def open(self, folder: Path) -> None:
        self._ledger = Ledger(folder / LEDGER_FILE, self.plan)

    def draw(self, step: int) -> np.ndarray:
        plan = self.plan
        random = self._random("sampling", step)
        drawn = poisson_batch(plan.num_examples, plan.bands * plan.expected_batch_size, random)
        if self._groups is not None:
            drawn = drawn[self._groups[drawn] == step % plan.bands]
        return self._units.units.rows_of(drawn, random) if self._units else drawn

    def begin(self, step: int, rank: int) -> None:
        self._masks.step = step

    def expect(self, examples: np.ndarray, num_ranks: int) -> list[np.ndarray] | None:
        self._left = Counter(examples.tolist())
        return self._units.expect(examples, num_ranks) if self._units else None

    def capture(
        self, examples: np.ndarray, rows: int | None = None
    ) -> AbstractContextManager[None]:
        self._captured = examples
        rows = rows or len(examples)
        # Beyond the last row there is nobody.
        nobody = np.full(rows - len(examples), np.iinfo(np.int64).max)
        self._masks.rows = np.concatenate([examples, nobody])
        return self.gradients.capture(rows)

    def add(self, total: torch.Tensor) -> torch.Tensor:
        # A row that is added twice moves the sum by two clip norms.
        self._left.subtract(self._captured.tolist())
        if any(self._left[row] < 0 for row in self._captured.tolist()):
            raise RuntimeError("a row that was not drawn, or has been added, would be added")
        plan = self.plan
        if self._units:
            return self._units.add(
                self.gradients, self._captured, total, plan.clip_norm, plan.clip_function
            )
        norms = self.gradients.add_clipped_sum(total, plan.clip_norm, plan.clip_function)
        return norms[: len(self._captured)]

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        """The sum with noise, float64, once its step is on record; zeros on other processes."""
        if self._units:
            self._units.require_whole()
        if not self._is_main:
            return torch.zeros_like(total, dtype=torch.float64)
        self.ledger.record_step(step + 1)
        plan, random = self.plan, self._random("noise", step)
        correlate = partial(self._noise.following, step)
        return add_noise(total, plan.noise_multiplier, plan.clip_norm, random, correlate)

    def rehearse_release(self, total: torch.Tensor) -> float:
        if not self._is_main:
            return 0.0
        noise, last = CorrelatedNoise(self.plan.coefficients), self.plan.bands - 1
        for step in range(last):
            noise.following(step, torch.ones(total.numel(), dtype=torch.float64))
        began = time.monotonic()
        correlate = partial(noise.following, last)
        add_noise(total, 1.0, 1.0, SecureRandom(), correlate).sum().item()  # waits for the device
        return time.monotonic() - began

    @property
    def bytes_of_past_noise(self) -> int:
        return 8 * (self.plan.bands - 1) * self.gradients.num_parameters if self._is_main else 0

    def statistics(self, norms: Sequence[torch.Tensor]) -> dict:
        return clipping_summary(norms, self.plan.clip_norm)

    def report(self, steps_taken: int) -> dict:
        self.ledger.require_unchanged()
        return build_report(
            self.plan,
            steps_taken=steps_taken,
            steps_recorded=self.steps_recorded,
            participations=self.plan.participations(self.ledger.steps),
            ledger_head=self.head,
            insecure=self._known_seed is not None,
            numerics=self.numerics,
        )

    def describe(self) -> str:
        plan = self.plan
        return (
            f"({plan.target_epsilon:g}, {plan.delta:g})-DP: sampling rate "
            f"{plan.sampling_rate:.3g}, noise multiplier {plan.noise_multiplier:g}, "
            f"clip norm {plan.clip_norm:g}"
            + (f", noise of {plan.bands} bands" if plan.bands > 1 else "")
        )

    @property
    def steps_recorded(self) -> int:
        return self.ledger.steps_recorded

    @property
    def head(self) -> dict | None:
        return self.ledger.head

    @property
    def adapter(self) -> str | None:
        return self.ledger.adapter

    def record_adapter(self, sha256: str) -> None:
        self.ledger.record_adapter(sha256)

    def require_head(self, head: dict | None) -> None:
        assert head is not None  # every checkpoint of a DP run has one
        self.ledger.require_head(head)

    def close(self) -> None:
        self.ledger.close()

    def _random(self, stream: str, step: int) -> SecureRandom:
        if self._known_seed is not None:
            return SecureRandom.insecure_fixed(self._known_seed, stream, step)
        return self._streams[stream]


class Plain(Mechanism):
    """Shuffled epochs and plain sums, all from public values: no privacy.

    Args:
        parameters: the trainable tensors by name, in the order of the sum.
        seed: decides batches and dropout.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        num_examples: int,
        batch_size: int,
        loss_normalization: str,
        seed: int,
    ):
        self.num_examples = num_examples
        self.divisor = batch_size
        self.loss_normalization = loss_normalization
        self._parameters = parameters
        self._seed = seed

    def open(self, folder: Path) -> None:
        """There is nothing to record."""

    def draw(self, step: int) -> np.ndarray:
        return shuffled_batch(self.num_examples, self.divisor, self._seed, step)

    def begin(self, step: int, rank: int) -> None:
        # From (seed, step, rank) alone, so that a resumed run repeats it.
        state = np.random.SeedSequence((self._seed, step, rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> np.uint64(1)))

    def capture(
        self, examples: np.ndarray, rows: int | None = None
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, total: torch.Tensor) -> torch.Tensor:
        offset = 0
        for tensor in self._parameters.values():
            if tensor.grad is not None:
                total[offset : offset + tensor.numel()].view_as(tensor).add_(tensor.grad)
                tensor.grad = None
            offset += tensor.numel()
        return total.new_zeros(0)

    def release(self, total: torch.Tensor, step: int) -> torch.Tensor:
        return total

    def statistics(self, norms: Sequence[torch.Tensor]) -> dict:
        return {}

    def report(self, steps_taken: int) -> dict:
        return build_report(None)

    def describe(self) -> str:
        return "NO differential privacy (--eps -1)"

    def record_adapter(self, sha256: str) -> None:
        """There is no record to end with it."""

    def require_head(self, head: dict | None) -> None:
        """There is no record to continue."""

    def close(self) -> None:
        """There is no record to end."""


def clipping_summary(norms: Sequence[torch.Tensor], clip_norm: float) -> dict:
    """Quantiles of the per-example gradient norms, and what was clipped: for private/ alone."""
    if not norms:
        return {}
    all_norms = torch.cat(list(norms))
    finite = all_norms[torch.isfinite(all_norms)]
    if not len(finite):
        return {"non_finite": len(all_norms)}
    quantiles = torch.quantile(finite, torch.tensor([0.1, 0.5, 0.9], device=finite.device))
    return {
        "norm_quantiles_10_50_90": [round(value, 5) for value in quantiles.tolist()],
        "clipped_fraction": (finite > clip_norm).float().mean().item(),
        "non_finite": len(all_norms) - len(finite),
    }
