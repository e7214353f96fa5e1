"""The DP core: per-example gradients through hooks, clipping, sums, Gaussian noise.

Everything here works on sums of clipped per-example gradients, flattened into one float32 vector
over all trainable tensors. The division by the public batch size is the caller's, in one place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.cli import UsageError
from utils.devices import to_device
from utils.secure_random import SecureRandom, grid_spacing, round_to_grid

AUTOMATIC_CLIPPING_STABILITY = 0.01
# Below this share of what it could be, a squared ghost norm is mostly rounding: a float32 Gram
# matrix is exact to about 1e-7 of that, and norms are to be exact to 1e-5.
CANCELLATION = 0.01


def clip_factors(norms: torch.Tensor, clip_norm: float, clip_function: str) -> torch.Tensor:
    """Factors that bound every example's gradient by `clip_norm` in l2 norm.

    Guarantee: factor · norm <= clip_norm for every finite norm, and 0 for a non-finite one.

    Args:
        norms: float [examples], l2 norms over all trainable tensors together.
        clip_norm: C, above 0.
        clip_function: "flat" gives min(1, C / norm) (Abadi et al., 2016); "automatic" gives
            C / (norm + 0.01) (Bu et al., 2023, "Automatic Clipping", AUTO-S).

    Returns:
        float [examples].
    """
    if clip_function == "automatic":
        factors = clip_norm / (norms + AUTOMATIC_CLIPPING_STABILITY)
    else:
        factors = (clip_norm / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def add_noise(
    clipped_sum: torch.Tensor,
    noise_multiplier: float,
    clip_norm: float,
    random: SecureRandom,
    correlate: Callable[[torch.Tensor], torch.Tensor] = lambda fresh: fresh,
) -> torch.Tensor:
    """Add N(0, (noise_multiplier · clip_norm)²) to every coordinate and round to a public grid.

    Guarantee: if adding or removing one example moves `clipped_sum` by at most `clip_norm` in l2
    norm, the result is one Gaussian mechanism of that noise multiplier. Rounding is
    post-processing that removes the low-order bits (Mironov, CCS 2012).

    Args:
        clipped_sum: float32 [parameters], summed over microbatches and ranks.
        correlate: what makes this step's noise of fresh N(0, 1), see
            `privacy.banded.CorrelatedNoise`; the guarantee is then one of all steps together.

    Returns:
        float64 [parameters], every value a multiple of `grid_spacing(sigma · C)`.
    """
    deviation = noise_multiplier * clip_norm
    noise = correlate(random.gaussian(clipped_sum.numel())).to(clipped_sum.device)
    noised = clipped_sum.double() + deviation * noise
    return round_to_grid(noised, grid_spacing(deviation))


def instantiates(tokens: int, d_in: int, d_out: int) -> bool:
    """Whether a layer's per-example gradients are instantiated, or left as pairs with ghost norms.

    One example's gradient holds d_in · d_out numbers; the pair (input, output gradient) that it is
    the product of holds tokens · (d_in + d_out). What is smaller is kept until the clip factors are
    known, so that memory stays below a fixed multiple of the layer's own input and output, however
    many examples share a microbatch. The smaller one is also the faster one, but for close calls:
    both ways pay the 2 · tokens · d_in · d_out FLOPs of an ordinary weight gradient for each
    example, and instantiating also writes and reads its numbers once more, and ghost norms
    (Goodfellow, 2015; Li et al., 2022, section 4) take 2 · tokens² · (d_in + d_out) FLOPs. All of
    these grow with the number of examples alike, so it decides nothing.
    """
    return d_in * d_out <= tokens * (d_in + d_out)


def products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Matrix products with sums in float32, which nothing rounds.

    Args:
        first: [examples, n, k], in float32, or in bfloat16, whose products float32 has exactly.
        second: [examples, k, m], in the same dtype.

    Returns:
        float32 [examples, n, m].
    """
    if first.dtype == torch.bfloat16 and first.device.type != "cpu":  # which has no such kernel
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first.float(), second.float())


def ghost_norms(
    inputs: torch.Tensor, output_gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the per-example gradients of a linear layer, without the gradients.

    ||g'x||² = sum over token pairs (s, t) of <x_s, x_t> <g_s, g_t>.

    Args:
        inputs: float32 [examples, tokens, d_in].
        output_gradients: float32 [examples, tokens, d_out].

    Returns:
        float32 [examples], norms; and bool [examples], where the terms cancel to so little that a
        norm may be mostly rounding.
    """
    gram = torch.bmm(inputs, inputs.transpose(1, 2))
    gradient_gram = torch.bmm(output_gradients, output_gradients.transpose(1, 2))
    lengths = (gram.diagonal(dim1=1, dim2=2) * gradient_gram.diagonal(dim1=1, dim2=2)).sqrt()
    squares = gram.mul_(gradient_gram).sum(dim=(1, 2))
    # The largest that a norm could be, were no term to cancel, is the sum of the lengths.
    cancelled = squares < CANCELLATION * lengths.sum(dim=1).square()
    return squares.clamp(min=0).sqrt(), cancelled


class FactorLinear(nn.Linear):
    """A Linear layer without bias whose float32 weight multiplies in the dtype of its input."""

    def forward(self, inputs: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """The product, added to `start` before it is rounded.

        Args:
            inputs: [..., d_in], in bfloat16 with sums in float32.
            start: [..., d_out], in the same dtype.

        Returns:
            [..., d_out], in the same dtype.
        """
        weight = self.weight.to(inputs.dtype)
        if start is None:
            return nn.functional.linear(inputs, weight)
        product = torch.addmm(start.flatten(0, -2), inputs.flatten(0, -2), weight.t())
        return product.view(start.shape)


class PerExampleGradients:
    """Per-example gradients of every trainable tensor of a model, in one backward pass.

    Each trainable tensor must be the weight of an `nn.Linear` or `FactorLinear` without bias that
    sees [examples, tokens, features] exactly once in a forward pass, as LoRA's A and B do. A
    forward hook passes the layer's output through an identity whose backward holds both the layer's
    input and its output gradient; their product per example is the per-example gradient,
    instantiated or not as `instantiates` says. Autograd's own weight gradient is never computed.
    Works under non-reentrant activation checkpointing, whose recomputed forward runs the hook
    again.

    Raises:
        UsageError: a trainable tensor is not covered; the message names it.
    """

    def __init__(self, model: nn.Module):
        self.parameters = {
            name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        if not self.parameters:
            raise UsageError("the model has no trainable tensor")
        names = {id(tensor): name for name, tensor in self.parameters.items()}
        users: dict[str, list[nn.Module]] = {name: [] for name in self.parameters}
        for module in model.modules():
            for tensor in module.parameters(recurse=False):
                if id(tensor) in names:
                    users[names[id(tensor)]].append(module)
        for name, modules in users.items():
            if len(modules) != 1:
                raise UsageError(f"{name} is shared by {len(modules)} layers; DP needs one")
            layer = modules[0]
            if type(layer) not in (nn.Linear, FactorLinear) or layer.bias is not None:
                raise UsageError(
                    f"{name} is trainable but not the weight of a Linear layer without bias, so "
                    "per-example clipping cannot cover it; train LoRA adapters alone"
                )
            layer.register_forward_hook(self._make_hook(name))
        self.num_parameters = sum(tensor.numel() for tensor in self.parameters.values())
        self._num_examples = 0
        self._captured: dict[str, _Instantiated | _Pair] = {}

    def _make_hook(self, name: str):
        def hook(_module: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor):
            if not self._num_examples:
                return None
            return _Tap.apply(
                output, inputs[0], self._anchor, lambda x, g: self._deposit(name, x, g)
            )

        return hook

    def _deposit(self, name: str, inputs: torch.Tensor, output_gradient: torch.Tensor) -> None:
        if inputs.dim() != 3 or inputs.shape[0] != self._num_examples:
            raise RuntimeError(
                f"{name} saw an input of shape {list(inputs.shape)}; per-example gradients need "
                f"[{self._num_examples} examples, tokens, features]"
            )
        if name in self._captured:
            raise RuntimeError(f"{name} was used twice in one forward pass")
        _, tokens, d_in = inputs.shape
        form = _Instantiated if instantiates(tokens, d_in, output_gradient.shape[2]) else _Pair
        # What the model saved for its backward pass is still part of the graph.
        self._captured[name] = form(inputs.detach(), output_gradient)

    @contextmanager
    def capture(self, num_examples: int) -> Iterator[None]:
        """Collect per-example gradients of the one forward and backward pass made inside.

        Args:
            num_examples: examples in this microbatch, the first axis of every layer's input.

        Raises:
            RuntimeError: a trainable tensor got no per-example gradient; the message names it.
        """
        self._num_examples = num_examples
        self._captured.clear()
        # One for all layers, made on their device: a copy from the CPU would wait for it.
        device = next(iter(self.parameters.values())).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        for tensor in self.parameters.values():
            tensor.requires_grad_(False)
        try:
            yield
        finally:
            self._num_examples = 0
            for tensor in self.parameters.values():
                tensor.requires_grad_(True)
        missing = [name for name in self.parameters if name not in self._captured]
        if missing:
            raise RuntimeError(f"no per-example gradient for {missing[0]} ({len(missing)} in all)")
        settle(self._captured.values())

    @torch.no_grad()
    def of_example(self, place: int) -> torch.Tensor:
        """The captured gradient of one example, and the norms that its clip factor follows from.

        Args:
            place: of the example in its microbatch.

        Returns:
            float32 [parameters + tensors].
        """
        captured = [self._captured[name] for name in self.parameters]
        norms = torch.stack([layer.norms[place] for layer in captured])
        return torch.cat([*(layer.of_example(place).flatten() for layer in captured), norms])

    @torch.no_grad()
    def add_examples(self, sums: torch.Tensor, places: list[int]) -> None:
        """Add the captured gradient of each example to a row of `sums`, in place.

        Args:
            sums: float32 [rows, parameters], in the order of `parameters`.
            places: for each example its row; captured examples beyond them are left out.
        """
        # In a round no row is added to twice, so that a sum has the order of its own examples.
        rounds: list[tuple[list[int], list[int]]] = []
        for example, place in enumerate(places):
            number = places[:example].count(place)
            if number == len(rounds):
                rounds.append(([], []))
            rounds[number][0].append(example)
            rounds[number][1].append(place)
        on_device = [to_device(torch.tensor(each), sums.device) for each in rounds]
        offset = 0
        for name, tensor in self.parameters.items():
            part = sums[:, offset : offset + tensor.numel()]
            self._captured.pop(name).add_to_rows(part, places, on_device)
            offset += tensor.numel()

    @torch.no_grad()
    def add_clipped_sum(
        self, total: torch.Tensor, clip_norm: float, clip_function: str
    ) -> torch.Tensor:
        """Clip the captured per-example gradients and add their sum to `total`, in place.

        Guarantee: every example adds a vector of l2 norm at most `clip_norm`, whatever the other
        examples are; one whose gradient is not finite adds exactly zero.

        Args:
            total: float32 [parameters], in the order of `parameters`.

        Returns:
            float32 [examples], norms before clipping. Computed from private data without noise:
            for `private/` alone.
        """
        captured = [self._captured.pop(name) for name in self.parameters]
        # The squares of all layers' norms add up to the square of the one norm over all of them.
        layer_norms = torch.stack([layer.norms for layer in captured])
        # Example by example, since a sum over the first axis rounds by the number of columns.
        norms = torch.linalg.vector_norm(layer_norms.double().t().contiguous(), dim=1).float()
        factors = clip_factors(norms, clip_norm, clip_function)
        finite = torch.isfinite(norms)
        if not finite.all():
            # A factor of zero does not silence a NaN: 0 · NaN is NaN.
            for layer in captured:
                layer.silence(~finite)
        offset = 0
        for tensor in self.parameters.values():
            # Let go of one after the other: what is left shrinks while the sum is made.
            captured.pop(0).add_weighted_sum(
                total[offset : offset + tensor.numel()].view_as(tensor), factors
            )
            offset += tensor.numel()
        return norms


class _Instantiated:
    """A layer's per-example gradients [examples, d_out · d_in]."""

    def __init__(self, inputs: torch.Tensor, output_gradients: torch.Tensor):
        # [examples, d_out, tokens] @ [examples, tokens, d_in] -> [examples, d_out, d_in]
        self.gradients = products(output_gradients.transpose(1, 2), inputs).flatten(1)
        # In float32 the norm of a million numbers is off by 1e-5 on a CPU, of more by more.
        norms = torch.linalg.vector_norm(self.gradients, dim=1, dtype=torch.float64)
        self.norms = norms.float()

    def of_example(self, place: int) -> torch.Tensor:
        return self.gradients[place]

    def add_to_rows(
        self, sums: torch.Tensor, places: list[int], rounds: list[torch.Tensor]
    ) -> None:
        for examples, rows in rounds:
            sums.index_add_(0, rows, self.gradients[examples])

    def silence(self, examples: torch.Tensor) -> None:
        self.gradients.masked_fill_(examples[:, None], 0.0)

    def add_weighted_sum(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        total.view(-1).addmv_(self.gradients.t(), factors)


class _Pair:
    """A layer's inputs and output gradients, of which one product makes the weighted sum.

    "Book-keeping" (Bu et al., 2023, "Differentially Private Optimization on Large Model at Small
    Cost"): the backward pass is not repeated with the clip factors. Examples whose terms cancel
    are instantiated all the same, by `settle`: what is added is then what was measured, to the last
    bit.
    """

    def __init__(self, inputs: torch.Tensor, output_gradients: torch.Tensor):
        self.inputs, self.output_gradients = inputs.float(), output_gradients.float()
        self.norms, self.cancelled = ghost_norms(self.inputs, self.output_gradients)
        self.exact: _Instantiated | None = None

    def instantiate(self, apart: torch.Tensor) -> None:
        """Instantiate the examples at the places `apart`, int64 on the device."""
        self.apart = apart
        self.exact = _Instantiated(self.inputs[apart], self.output_gradients[apart])
        self.norms[apart] = self.exact.norms

    def of_example(self, place: int) -> torch.Tensor:
        return self.output_gradients[place].t() @ self.inputs[place]

    def add_to_rows(
        self, sums: torch.Tensor, places: list[int], rounds: list[torch.Tensor]
    ) -> None:
        # One at a time: gradients of all of them at once take more than the pairs.
        for example, place in enumerate(places):
            sums[place] += self.of_example(example).flatten()

    def silence(self, examples: torch.Tensor) -> None:
        # Both may be shared with the model's own backward pass, so these are copies.
        self.inputs = self.inputs.masked_fill(examples[:, None, None], 0.0)
        self.output_gradients = self.output_gradients.masked_fill(examples[:, None, None], 0.0)

    def add_weighted_sum(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        if self.exact:
            self.exact.add_weighted_sum(total, factors[self.apart])
            factors = factors.index_fill(0, self.apart, 0.0)
        factors = factors.repeat_interleave(self.inputs.shape[1]).unsqueeze(1)
        inputs, gradients = self.inputs.flatten(0, 1), self.output_gradients.flatten(0, 1)
        # The wider of the two comes last: the other way round takes BLAS up to eight times longer.
        if inputs.shape[1] < gradients.shape[1]:
            total.add_(((inputs * factors).t() @ gradients).t())
        else:
            total.add_((gradients * factors).t() @ inputs)


def settle(layers: Iterable[_Instantiated | _Pair]) -> None:
    """Instantiate the examples of pairs whose terms cancel, wherever there are some.

    Whether there are is asked of the device once, for all layers together.
    """
    pairs = [layer for layer in layers if isinstance(layer, _Pair)]
    if not pairs:
        return
    cancelled = torch.stack([pair.cancelled for pair in pairs]).cpu()  # [layers, examples]
    places = to_device(cancelled.nonzero()[:, 1], pairs[0].norms.device)
    for pair, apart in zip(pairs, places.split(cancelled.sum(dim=1).tolist())):
        if len(apart):
            pair.instantiate(apart)


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward hands over the input and the output gradient.

    The anchor, a scalar that requires a gradient, makes the backward run even where neither the
    layer's input nor its (frozen for the moment) weight asks for one.
    """

    @staticmethod
    def forward(ctx, output, inputs, anchor, deposit):
        ctx.save_for_backward(inputs)
        ctx.deposit = deposit
        return output.view_as(output)

    @staticmethod
    def backward(ctx, output_gradient):
        ctx.deposit(*ctx.saved_tensors, output_gradient)
        return output_gradient, None, None, None


def assign_gradient(parameters: dict[str, nn.Parameter], gradient: torch.Tensor) -> None:
    """Cut a flat gradient [parameters] into `.grad` of each tensor, in its dtype."""
    offset = 0
    for tensor in parameters.values():
        piece = gradient[offset : offset + tensor.numel()]
        tensor.grad = piece.view_as(tensor).to(tensor.dtype)
        offset += tensor.numel()
