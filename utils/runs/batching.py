"""Microbatches: what of a logical batch is computed at once, in which shape, on which process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from utils.cli import say
from utils.models.footprint import RowMemory

Result = TypeVar("Result")

# What a microbatch costs besides its padded tokens on a CPU (reading the weights, above all), as a
# number of tokens.
MICROBATCH_TOKENS = 128
# On a GPU it is the time in which the CPU launches kernels, for each layer. Of an H200, with DP and
# a LLaMA of 22 layers, it was measured: 153 ms for microbatches of 440 tokens and 163 ms for those
# of 4,096, of which the GPU computed 75 ms, so at 260 TFLOP/s. That of float32 is not measured.
LAUNCH_SECONDS = 7e-3
HALF_FLOPS, SINGLE_FLOPS = 2.6e14, 4e13
# Of a token for each weight, which is frozen: forward, and back to its input.
FLOPS_OF_A_WEIGHT = 4
# At least so many microbatches a rank, that they can be dealt out evenly.
MICROBATCHES_PER_RANK = 8
# Lengths of the grid lie so far apart at least, and up to one of these shares of themselves.
GRID_STEP, GRID_SHARES = 8, (1 / 8, 1 / 4, 1 / 2, 1.0)
OUT_OF_MEMORY = (
    "out of memory in the middle of a step: such microbatches pass in halves from now on; nothing "
    "is lost or counted twice, and a lower --perdevice_bs saves the time"
)


@dataclass(frozen=True)
class Microbatch:
    """Examples that pass together, and the shape they pass in.

    Attributes:
        examples: int64 indices.
        rows: what passes in all; those beyond the examples are empty.
        tokens: the padded length.
    """

    examples: np.ndarray
    rows: int
    tokens: int


@dataclass(frozen=True)
class Shapes:
    """Shapes of microbatches by which an example's own length decides how it is computed.

    Which kernel multiplies two matrices, and in which order it adds, follows from their shapes: in
    bfloat16 an example's gradient changes by up to 1% with the shape of its microbatch. An example
    is therefore padded to a length of a grid that its own length alone decides and, where the
    device asks for it, passes with a number of rows that this length alone decides.

    Attributes:
        max_seq_len: tokens of the longest example there can be, public.
        token_budget: padded tokens of a microbatch, at most.
        tokens: padded tokens of a microbatch with a fixed number of rows, which empty ones fill
            up; None where any number of rows computes the same.
        share: of itself by which a length is padded at most, from `GRID_SHARES`; below 65 tokens it
            is by less than `GRID_STEP` where that is more.
        memory: of a row. No microbatch takes more than one of the greatest length does; of short
            rows, whose gradients take more for each token than long ones' do, fewer pass together.
    """

    max_seq_len: int
    token_budget: int
    tokens: int | None
    memory: RowMemory = RowMemory()
    share: float = GRID_SHARES[0]

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """The padded length of examples of so many tokens, int64 of the same shape."""
        lengths = np.maximum(lengths, 1).astype(np.int64)
        # The largest power of two that is at most the share of the length below.
        exponents = np.floor(np.log2(np.maximum(lengths - 1, 1) * self.share)).astype(np.int64)
        steps = np.maximum(GRID_STEP, 1 << np.maximum(exponents, 0))
        return np.minimum(-(-lengths // steps) * steps, self.max_seq_len)

    def most_rows(self, padded: int) -> int:
        """How many rows of this padded length pass together at most."""
        longest = self.max_seq_len
        whole = self.token_budget * self.memory.of(longest)
        return max(1, whole // (longest * self.memory.of(padded)))

    def rows(self, padded: int) -> int:
        """How many rows of this padded length pass together, if `tokens` fixes them."""
        assert self.tokens is not None
        return max(1, min(self.tokens // padded, self.most_rows(padded)))

    def samples(self) -> list[int]:
        """Padded lengths to try: the shortest, one between, and the longest."""
        between = round(self.max_seq_len**0.5) + GRID_STEP
        return self.padded(np.array([1, between, self.max_seq_len])).tolist()


@dataclass(frozen=True)
class Cost:
    """What a microbatch costs, as a number of tokens that the device computes in that time.

    Attributes:
        launching: what it costs besides its padded tokens.
        overlaps: whether the device computes meanwhile, so that the longer of the two counts, and
            not their sum.
    """

    launching: int
    overlaps: bool = False

    def of(self, padded: ArrayLike) -> np.ndarray:
        """Of microbatches of so many padded tokens, or of one."""
        return (np.maximum if self.overlaps else np.add)(padded, self.launching)


ON_A_CPU = Cost(MICROBATCH_TOKENS)


def cost_on(device_type: str, dtype: torch.dtype, num_layers: int, num_parameters: int) -> Cost:
    """The cost of microbatches on such a device.

    Args:
        dtype: in which the model computes.
        num_parameters: of the whole model.
    """
    if device_type == "cpu":
        return ON_A_CPU
    flops = SINGLE_FLOPS if dtype == torch.float32 else HALF_FLOPS
    launching = LAUNCH_SECONDS * num_layers * flops / (FLOPS_OF_A_WEIGHT * num_parameters)
    return Cost(max(MICROBATCH_TOKENS, round(launching)), overlaps=True)


def cheapest_shapes(shapes: Shapes, num_rows: int, cost: Cost) -> Shapes:
    """Of all grids, and of all numbers of rows where `shapes` fix one, those that cost least.

    A fine grid pads little, and takes a microbatch for each of its lengths; a large microbatch
    amortises its overhead, and empty rows fill up one for each length. How long texts are is
    private, so rows are taken to be as many in every octave of lengths.

    Args:
        shapes: `tokens` is the least that may be fixed.
        num_rows: expected in a logical batch, public.
        cost: of a microbatch, see `cost_on`.

    Returns:
        `shapes` with another `share` and, where they fix one, another number of `tokens`.
    """
    every = np.arange(1, shapes.max_seq_len + 1)

    def of_all(candidate: Shapes) -> float:
        grid, first = np.unique(candidate.padded(every), return_index=True)
        # Shifted, so that the lengths up to the first one are rows too.
        octaves = np.log2(np.append(every[first], every[-1] + 1) + GRID_STEP)
        rows = num_rows * np.diff(octaves) / (octaves[-1] - octaves[0])
        if candidate.tokens:
            most = np.array([candidate.rows(int(tokens)) for tokens in grid])
        else:
            most = np.array([max(1, candidate.most_rows(int(tokens))) for tokens in grid])
        # Half a microbatch more than the rows fill; one at least, of lengths that a batch has.
        microbatches = np.maximum(rows / most + 0.5, np.minimum(rows, 1))
        computed = microbatches * most if candidate.tokens else rows
        return float((microbatches * cost.of(computed * grid / microbatches)).sum())

    sizes: list[int | None] = [None]
    if least := shapes.tokens:
        doublings = max(0, (shapes.token_budget // least).bit_length() - 1)
        sizes = [least << doubling for doubling in range(doublings + 1)]
        sizes.append(max(least, shapes.token_budget))
    return min(
        (replace(shapes, share=share, tokens=size) for share in GRID_SHARES for size in sizes),
        key=of_all,
    )


def cut_microbatches(
    indices: np.ndarray,
    lengths: np.ndarray,
    token_budget: int,
    num_ranks: int = 1,
    shapes: Shapes | None = None,
    cost: Cost = ON_A_CPU,
) -> list[list[Microbatch]]:
    """Cut a logical batch into microbatches of similar lengths, and deal them to ranks.

    Examples are sorted by length, the longest first, so that a budget that does not fit shows at
    once. Without `shapes` they are cut where that makes the cost of all of them least, a microbatch
    having examples · longest padded tokens; with them, examples of one padded length pass
    together. No microbatch passes the budget, nor takes more memory than `shapes` allow, but for
    one example that does alone. Each goes to the rank with the least to do so far.

    Args:
        indices: int64, the logical batch.
        lengths: int [num_examples], tokens of every example of the data set.
        token_budget: padded tokens per microbatch; at least the longest example's.
        cost: of a microbatch, see `cost_on`.

    Returns:
        For each rank its microbatches; an empty list for a rank without examples.
    """
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    sizes = lengths[order]
    if not len(order):
        return [[] for _ in range(num_ranks)]
    longest = int(sizes[0])
    if longest > token_budget:
        raise ValueError(f"an example of {longest} tokens exceeds the budget {token_budget}")
    if num_ranks > 1:
        share = int(sizes.sum()) // (num_ranks * MICROBATCHES_PER_RANK)
        least = int(shapes.padded(sizes[:1])[0]) if shapes else longest
        token_budget = min(token_budget, max(least, share, cost.launching))
    if shapes:
        cuts = _cuts_of_shapes(shapes.padded(sizes), token_budget, shapes)
    else:
        cuts = [
            (start, end, end - start, int(sizes[start]))
            for start, end in _cheapest_cuts(sizes, token_budget, cost)
        ]
    cut = [[Microbatch(order[start:end], rows, tokens)] for start, end, rows, tokens in cuts]
    return _dealt(cut, num_ranks, cost)


def deal_parts(
    parts: list[np.ndarray],
    lengths: np.ndarray,
    token_budget: int,
    num_ranks: int,
    shapes: Shapes | None,
    cost: Cost = ON_A_CPU,
) -> list[list[Microbatch]]:
    """`cut_microbatches` of each part of a logical batch, all of one part for the same rank."""
    cut = (cut_microbatches(part, lengths, token_budget, 1, shapes, cost) for part in parts)
    return _dealt([own for (own,) in cut], num_ranks, cost)


def _dealt(groups: list[list[Microbatch]], num_ranks: int, cost: Cost) -> list[list[Microbatch]]:
    """Groups of microbatches by rank, each for the rank with the least to do so far."""
    ranks: list[list[Microbatch]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for group in groups:
        rank = loads.index(min(loads))
        ranks[rank] += group
        loads[rank] += sum(int(cost.of(each.rows * each.tokens)) for each in group)
    return ranks


def _cuts_of_shapes(
    sizes: np.ndarray, token_budget: int, shapes: Shapes
) -> list[tuple[int, int, int, int]]:
    """Start, end, rows and tokens of each microbatch of a descending sequence of padded lengths."""
    cuts, first = [], 0
    for size, count in zip(*np.unique(-sizes, return_counts=True)):
        tokens, last = -int(size), first + int(count)
        if shapes.tokens:
            most = shapes.rows(tokens)
        else:
            most = max(1, min(token_budget // tokens, shapes.most_rows(tokens)))
        for start in range(first, last, most):
            end = min(start + most, last)
            cuts.append((start, end, most if shapes.tokens else end - start, tokens))
        first = last
    return cuts


def _cheapest_cuts(sizes: np.ndarray, token_budget: int, cost: Cost) -> list[tuple[int, int]]:
    """Start and end of each microbatch of a descending sequence of lengths.

    The least cost of all from example i on is, over the j that the budget allows, the least of
    the cost of sizes[i] · (j - i) tokens + the least cost from j on.
    """
    costs = np.zeros(len(sizes) + 1, dtype=np.int64)
    ends = np.zeros(len(sizes), dtype=np.int64)
    counts = np.arange(1, token_budget // int(sizes[-1]) + 1)
    for start in range(len(sizes) - 1, -1, -1):
        size = int(sizes[start])
        most = min(len(sizes) - start, token_budget // size)
        candidates = costs[start + 1 : start + 1 + most] + cost.of(size * counts[:most])
        best = int(candidates.argmin())
        costs[start] = candidates[best]
        ends[start] = start + 1 + best
    cuts, start = [], 0
    while start < len(sizes):
        cuts.append((start, int(ends[start])))
        start = cuts[-1][1]
    return cuts


class Halving:
    """Passes microbatches, in halves where memory runs out.

    Guarantee: whatever runs out of memory when, every example of a microbatch is in exactly one of
    the passes that are yielded, in the microbatch's order. A half of a microbatch with a fixed
    number of rows has half of that number, so it is computed in another shape than its length
    alone decides; see `has_halved`.

    Args:
        shapes: those of the microbatches.
        may_halve: False where other processes wait for each pass of this one.
    """

    def __init__(self, shapes: Shapes | None, *, may_halve: bool = True):
        self._fixed = shapes is not None and shapes.tokens is not None
        self._may_halve = may_halve
        self._most: dict[int, int] = {}

    @property
    def has_halved(self) -> bool:
        """Whether memory has run out so far."""
        return bool(self._most)

    def passes(
        self, part: Microbatch, attempt: Callable[[Microbatch], Result]
    ) -> Iterator[tuple[Microbatch, Result]]:
        """Attempt a microbatch, or what it has to be parted into.

        Args:
            attempt: a pass, of which nothing counts yet; it has to leave nothing that counts
                where it raises.

        Yields:
            What passed, and what the attempt gave; it may be counted before the next one begins.

        Raises:
            torch.OutOfMemoryError: a single row does not fit, or nothing may be halved.
        """
        waiting = [part]
        while waiting:
            part = waiting.pop()
            if part.rows > self._most.get(part.tokens, part.rows):
                waiting += reversed(self._halves(part))
                continue
            try:
                result = attempt(part)
            except torch.OutOfMemoryError:
                if part.rows == 1 or not self._may_halve:
                    raise
            else:
                yield part, result
                continue
            # Here the error is gone, and with it what the failed pass held.
            torch.cuda.empty_cache()
            if not self._most:
                say(OUT_OF_MEMORY)
            self._most[part.tokens] = -(-part.rows // 2)
            waiting.append(part)

    def _halves(self, part: Microbatch) -> list[Microbatch]:
        """Both halves, or one where the rows of the other would all be empty."""
        rows = -(-part.rows // 2)
        cuts = [part.examples[:rows], part.examples[rows:]]
        return [
            Microbatch(cut, rows if self._fixed else len(cut), part.tokens)
            for cut in cuts
            if len(cut)
        ]
