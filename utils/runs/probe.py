"""Does an example's gradient depend on the examples next to it, on this device, in this dtype?

Kernels choose how they add by the shapes of what they are given, so two passes of one example may
differ in their last bits, in bfloat16 in their third digit. The probe passes public tokens through
the model that is going to be trained and compares to the last bit.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils.cli import UsageError, say
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.row_dropout import RowMasks
from utils.runs.batching import Shapes

# Beyond this share of its norm an example's gradient must not follow its company.
LARGEST_DIFFERENCE = 0.01
# Of the weights that LoRA starts at zero, while the probe lasts: with zeros, half of the gradients
# would be zero.
PROBE_SCALE = 0.01

# What a report says where rows of one length passed in several shapes, for want of memory.
HALVED = "not exact: memory ran out, and rows of one length passed in different shapes"

# The number of rows of a pass, the place of the example, and which rows are empty.
Pass = tuple[int, int, bool]


@dataclass(frozen=True)
class Numerics:
    """What a probe found.

    Attributes:
        difference: of an example's gradient in one company and in another, at most, over its norm.
        place: device and dtype that it was found on.
    """

    difference: float
    place: str

    def __str__(self) -> str:
        if not self.difference:
            return f"exact, probed on {self.place}"
        return (
            f"not exact: an example's gradient follows its company by up to "
            f"{self.difference:.2g} of its norm, probed on {self.place}"
        )


def full_precision() -> None:
    """Switch off what trades precision for speed: tf32, and sums in less than float32.

    On a GPU also kernels that add in the order in which threads happen to end, as far as
    `_deterministic` does not find that a model cannot do without them.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if torch.cuda.is_available():
        # Read when the first matrix is multiplied; torch asks for it where order is to be fixed.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Autograd's thread finds the context for itself, and whether attention may add in any order
        # `_deterministic` decides, and says.
        for message in ("Attempting to run cuBLAS, but there was no", "Flash Attention defaults"):
            warnings.filterwarnings("ignore", message=message)


def _deterministic(one_pass: Callable[[], None]) -> None:
    """Let a GPU fail rather than add in no fixed order, unless the model needs such a kernel.

    While it only warns, attention's backward pass takes the faster one: in bfloat16 and 22 layers
    that moved a gradient by 1% from one pass to the next.

    Args:
        one_pass: forward and backward pass of public tokens.
    """
    if not torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(True)
    try:
        one_pass()
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        say(f"the order of sums is not fixed: {str(error).split(', but')[0]}")


def probed(
    language_model: LanguageModel,
    gradients: PerExampleGradients,
    masks: RowMasks,
    free: Shapes,
    fixed: Shapes,
    largest_of_all: Callable[[float], float],
) -> tuple[Shapes, Numerics]:
    """The shapes in which the training of this model is to pass examples, and how exact it is.

    If any number of rows computes the same, it is free; else the padded length fixes it.

    Args:
        free: with any number of rows.
        fixed: with a fixed one.
        largest_of_all: the largest of a number over all processes, which decide alike.

    Raises:
        UsageError: an example's gradient is not finite, or follows its company by more than 1% of
            its norm.
    """
    model = language_model.model
    weight = next(model.parameters())
    place = f"{weight.device.type} in {str(weight.dtype).removeprefix('torch.')}"
    probe = _Probe(language_model, gradients, masks, place)
    model.train()
    with _public_weights(gradients.parameters):
        # Few rows of one length first: most devices show it at once.
        lengths = free.samples()
        middle = lengths[1]
        _deterministic(lambda: probe.disturb(middle))
        found = largest_of_all(probe.difference(middle, _in_any_number(free, middle)[:3]))
        if not found:
            found = largest_of_all(
                max(probe.difference(n, _in_any_number(free, n)) for n in lengths)
            )
        if not found:
            return free, Numerics(0.0, place)
        lengths = fixed.samples()
        found = largest_of_all(max(probe.difference(n, _in_one_number(fixed, n)) for n in lengths))
    if not found <= LARGEST_DIFFERENCE:
        raise UsageError(
            f"an example's gradient changes by {found:.1%} with the examples next to it, on "
            f"{place}, which privacy does not survive (at most {LARGEST_DIFFERENCE:.0%}); use "
            "another base, --dtype float32, or another device"
        )
    return fixed, Numerics(found, place)


def _in_any_number(shapes: Shapes, tokens: int) -> list[Pass]:
    most = shapes.most_rows(tokens)
    passes = [(1, 0, True), (2, 1, False), (3, 1, False), (most, most - 1, False), (1, 0, True)]
    return [each for each in passes if each[0] <= most]


def _in_one_number(shapes: Shapes, tokens: int) -> list[Pass]:
    rows = shapes.rows(tokens)
    company = [(rows, place, False) for place in {rows // 2, rows - 1}] if rows > 1 else []
    return [(rows, 0, True), *company, (rows, 0, True)]


class _Probe:
    """Passes of one public example in several companies.

    Args:
        masks: the example is row 0 and its company others, whose masks follow them.
        place: device and dtype, for what is said.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        gradients: PerExampleGradients,
        masks: RowMasks,
        place: str,
    ):
        self._language_model = language_model
        self._gradients = gradients
        self._masks = masks
        self._place = place

    def difference(self, tokens: int, passes: Sequence[Pass]) -> float:
        """How far the gradient of an example of almost `tokens` tokens moves, over its norm.

        Raises:
            UsageError: it is not finite.
        """
        first: torch.Tensor | None = None
        largest = 0.0
        for rows, place, alone in passes:
            found = self._gradient(tokens, rows, place, alone)
            if first is None:
                first = found
                if not first.isfinite().all():
                    raise UsageError(
                        f"the gradient of made-up tokens is not finite on {self._place}; use "
                        "another base, --dtype float32, or another device"
                    )
            elif not torch.equal(first, found):
                gap = (first - found).norm() / first.norm()
                # Equal but for the sign of a zero is equal; what is not a number is far away.
                largest = max(largest, float(gap.nan_to_num(1.0)))
            if alone and rows == 1:
                self.disturb(tokens)
        return largest

    def _gradient(self, tokens: int, rows: int, place: int, alone: bool) -> torch.Tensor:
        """The captured gradient of the example at `place` among `rows`."""
        batch = self._language_model.public_batch(rows, tokens)
        ids = self._language_model.public_batch(1, tokens)["input_ids"][0]
        lengths = batch["lengths"]
        # Its company: rows of every length that there is room for, and one whose loss is not a
        # number; or empty rows.
        spread = torch.arange(rows, device=lengths.device)
        lengths[:] = 0 if alone else 1 + spread * 5 % tokens
        batch["input_ids"] = batch["input_ids"].flip(0)
        batch["input_ids"][place] = ids
        lengths[place] = max(2, tokens - 1)
        weights = torch.ones(rows, device=lengths.device)
        if not alone and rows > 1:
            weights[(place + 1) % rows] = float("nan")
        self._masks.rows = np.where(np.arange(rows) == place, 0, 1 + np.arange(rows))
        self._pass(batch, weights)
        return self._gradients.of_example(place)

    def disturb(self, tokens: int) -> None:
        """A pass that is to leave nothing behind."""
        self._masks.rows = np.arange(1, 2)
        batch = self._language_model.public_batch(1, tokens)
        batch["input_ids"] = batch["input_ids"].flip(1)
        self._pass(batch, torch.ones(1, device=batch["lengths"].device))

    def _pass(self, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> None:
        with self._gradients.capture(len(weights)):
            sums, _ = self._language_model.example_losses(batch)
            (sums * weights).sum().backward()


@contextmanager
def _public_weights(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Adapters without zeros in the block; those that were there afterwards."""
    kept = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor in parameters.values():
            noise = torch.randn(tensor.shape, generator=generator) * PROBE_SCALE
            tensor.data.copy_(noise)
        yield
    finally:
        for name, tensor in parameters.items():
            tensor.data.copy_(kept[name])
