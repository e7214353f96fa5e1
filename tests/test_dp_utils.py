"""The DP core against a one-example-at-a-time float64 loop, and its guarantees."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils.dp_utils
from privacy_checks.tiny_model import tiny_llama
from tests.helpers import (
    adapted_model,
    clipped_sum,
    random_examples,
    reference_sum,
    relative_error,
)
from utils.cli import UsageError
from utils.dp_utils import (
    PerExampleGradients,
    add_noise,
    assign_gradient,
    clip_factors,
    ghost_norms,
    instantiates,
    products,
)
from utils.models.language_model import LanguageModel
from utils.models.lora import BaseDtypeLora
from utils.runs.batching import cut_microbatches
from utils.secure_random import SecureRandom, grid_spacing

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"])
@pytest.mark.parametrize("normalization", ["max_seq_len", "tokens"])
def test_clipped_sum_equals_one_by_one_reference(targets, checkpointing, normalization):
    data = random_examples([3, 50, 17, 1, 29, 8, 50, 2])
    model = adapted_model(targets, checkpointing=checkpointing)
    _, norms = reference_sum(model, data, 1.0, normalization=normalization)
    clip_norm = norms[norms > 0].median().item()  # some are clipped, some are not
    expected, _ = reference_sum(model, data, clip_norm, normalization=normalization)
    for budget in (50, 64, 120, 10_000):
        total, observed = clipped_sum(
            model, data, clip_norm, budget=budget, normalization=normalization
        )
        assert relative_error(total, expected) < 1e-5
        assert torch.allclose(observed.double(), norms.flatten(), rtol=1e-5)


@pytest.mark.parametrize("lengths", [[3] * 40 + [7] * 20, [2, 60, 9, 60, 1, 4, 33]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_instantiated_and_ghost_norm_layers_together_equal_the_reference(lengths, checkpointing):
    data = random_examples(lengths)
    model = adapted_model("all-linear", checkpointing=checkpointing, rank=16)
    _, norms = reference_sum(model, data, 1.0)
    clip_norm = norms[norms > 0].median().item()
    expected, _ = reference_sum(model, data, clip_norm)
    for budget in (60, 200, 10_000):
        total, observed = clipped_sum(model, data, clip_norm, budget=budget)
        assert relative_error(total, expected) < 1e-5
        assert torch.allclose(observed.double(), norms.flatten(), rtol=1e-5)


# ---------------------------------------------------------------- rows of units


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [2, 0, 2, 2], [3, 3, 1, 1], [1, 0]])
@pytest.mark.parametrize("rank", [4, 64])  # mostly instantiated; mostly ghost norms
def test_sums_of_several_rows_are_those_of_one_after_the_other_to_the_last_bit(places, rank):
    model, data = adapted_model("all-linear", rank=rank), random_examples([12] * 4)
    gradients, language_model = PerExampleGradients(model), LanguageModel(model.get_base_model())
    with gradients.capture(4):
        sums, _ = language_model.example_losses(data.collate(np.arange(4), 0))
        sums.sum().backward()
    start = torch.randn(4, gradients.num_parameters)
    expected, found = start.clone(), start.clone()
    for example, place in enumerate(places):
        expected[place] += gradients.of_example(example)[: gradients.num_parameters]
    with Kernels() as kernels:
        gradients.add_examples(found, places)
    assert torch.equal(found, expected)
    if rank == 4:
        # As many for each matrix as the largest unit has rows, and not as there are rows.
        most = max(map(places.count, places))
        assert kernels.counts["index_add_"] == len(gradients.parameters) * most
        assert kernels.counts["add_"] == 0


class Kernels(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- a base in bfloat16


def in_bfloat16(targets, **options):
    """A tiny LLaMA in bfloat16 with adapters, of which none computes in float32."""
    model = adapted_model(targets, base=tiny_llama().to(torch.bfloat16), **options)
    assert {t.dtype for t in model.parameters() if t.requires_grad} == {torch.float32}
    assert sum(isinstance(module, BaseDtypeLora) for module in model.modules()) >= 8
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("targets", "rank"), [(ATTENTION, 4), ("all-linear", 16)])
def test_sums_on_a_base_in_bfloat16_agree_with_the_reference(targets, rank, checkpointing):
    data = random_examples([5, 30, 12, 17])
    model = in_bfloat16(targets, rank=rank, checkpointing=checkpointing)
    expected, norms = reference_sum(model, data, 0.7)
    total, observed = clipped_sum(model, data, 0.7)
    assert relative_error(total, expected) < 0.05
    assert torch.allclose(observed.double(), norms.flatten(), rtol=0.05)


@pytest.mark.parametrize("rank", [4, 64])  # mostly instantiated; mostly ghost norms
def test_an_example_adds_at_most_the_clip_norm_in_bfloat16(rank):
    model, data = in_bfloat16("all-linear", rank=rank), random_examples([3, 50, 17, 29])
    for example in range(4):
        total, norms = clipped_sum(model, data, 1e-3, indices=np.array([example]))
        assert norms > 1e-3
        assert total.double().norm() == pytest.approx(1e-3, rel=1e-5)


def test_products_of_bfloat16_are_not_rounded_to_it():
    torch.manual_seed(0)
    first, second = torch.randn(3, 20, 400).bfloat16(), torch.randn(3, 400, 30).bfloat16()
    exact = first.double() @ second.double()
    assert products(first, second).dtype == torch.float32
    assert relative_error(products(first, second), exact) < 1e-6
    assert relative_error(first @ second, exact) > 1e-3


def test_no_copy_of_an_adapters_input_is_made_on_a_base_in_bfloat16():
    """What it was given is what the hook holds, one tensor for queries, keys and values."""
    model = in_bfloat16(ATTENTION)
    gradients, seen = PerExampleGradients(model), {}
    deposit = gradients._deposit

    def watched(name, inputs, output_gradient):
        seen.setdefault(inputs.data_ptr(), []).append(name)
        deposit(name, inputs, output_gradient)

    gradients._deposit = watched
    language_model = LanguageModel(model.get_base_model())
    with gradients.capture(2):
        sums, _ = language_model.example_losses(language_model.public_batch(2, 12))
        sums.sum().backward()
    together = [names for names in seen.values() if "lora_A" in names[0] and len(names) > 1]
    assert [len(names) for names in together] == [3, 3]


def test_what_is_smaller_is_kept_until_the_clip_factors_are_known():
    # (tokens, d_in, d_out) of LoRA's A; at a rank of 8 in a 7B model only tiny texts use pairs.
    assert [instantiates(tokens, 4096, 8) for tokens in (1, 7, 8, 1024)] == [0, 0, 1, 1]
    assert [instantiates(tokens, 4096, 64) for tokens in (8, 63, 64, 1024)] == [0, 0, 1, 1]
    assert [instantiates(tokens, 64, 11008) for tokens in (8, 63, 64, 1024)] == [0, 0, 1, 1]


def test_memory_is_bounded_however_many_examples_share_a_microbatch(monkeypatch):
    kept = {}

    def measure(layer):
        names = ("gradients", "inputs", "output_gradients")
        return sum(vars(layer)[name].numel() for name in names if name in vars(layer))

    for form in ("_Instantiated", "_Pair"):
        kind = getattr(utils.dp_utils, form)

        def recorder(layer, inputs, gradients, form=form, original=kind.__init__):
            original(layer, inputs, gradients)
            pair = max(1, inputs.numel() + gradients.numel())
            kept.setdefault(form, []).append(measure(layer) / pair)

        monkeypatch.setattr(kind, "__init__", recorder)
    model = adapted_model("all-linear", rank=16)
    for tokens in (2, 5, 20, 50):
        total, _ = clipped_sum(model, random_examples([tokens] * 100), 1.0)
        assert not total.requires_grad  # no graph of a pass hangs on it
    assert set(kept) == {"_Instantiated", "_Pair"}
    assert max(kept["_Instantiated"] + kept["_Pair"]) <= 1


def test_ghost_norms_equal_those_of_the_gradients():
    torch.manual_seed(0)
    inputs, gradients = torch.randn(50, 12, 300), torch.randn(50, 12, 40)
    exact = torch.bmm(gradients.double().transpose(1, 2), inputs.double()).flatten(1).norm(dim=1)
    norms, cancelled = ghost_norms(inputs, gradients)
    assert torch.allclose(norms.double(), exact, rtol=1e-6)
    assert not cancelled.any()


@pytest.fixture
def cancelling():
    """Inputs, output gradients, and exact norms of their products.

    In half of the examples all tokens say nearly the same, and their gradients sum to zero.
    """
    torch.manual_seed(0)
    inputs, gradients = torch.randn(40, 12, 300), torch.randn(40, 12, 40)
    inputs[::2] = inputs[::2, :1] + 1e-4 * torch.randn(20, 12, 300)
    gradients[::2] -= gradients[::2].mean(dim=1, keepdim=True)
    exact = torch.bmm(gradients.double().transpose(1, 2), inputs.double()).flatten(1).norm(dim=1)
    return inputs, gradients, exact


def test_ghost_norms_that_cancel_are_settled_by_every_pass(cancelling):
    inputs, gradients, exact = cancelling
    layer = torch.nn.Linear(300, 40, bias=False)
    captured = PerExampleGradients(layer)
    with captured.capture(40):
        layer(inputs).backward(gradients)
    norms = captured.add_clipped_sum(torch.zeros(40 * 300), 1e-3, "flat")
    assert torch.allclose(norms.double(), exact, rtol=1e-3)


def test_a_ghost_norm_that_cancels_is_not_lost_to_rounding(cancelling):
    inputs, gradients, exact = cancelling
    layer = utils.dp_utils._Pair(inputs, gradients)
    utils.dp_utils.settle([layer])
    assert layer.apart.tolist() == list(range(0, 40, 2))
    assert torch.allclose(layer.norms.double(), exact, rtol=1e-3)  # float32 inputs cancel, too
    for example in torch.eye(40)[::2]:
        total = torch.zeros(40, 300)
        layer.add_weighted_sum(total, clip_factors(layer.norms, 1e-3, "flat") * example)
        assert total.norm() <= 1e-3 * (1 + 1e-5)


def test_automatic_clipping_equals_reference():
    data = random_examples([5, 40, 12])
    model = adapted_model(ATTENTION)
    expected, _ = reference_sum(model, data, 0.7, "automatic")
    total, _ = clipped_sum(model, data, 0.7, clip_function="automatic")
    assert relative_error(total, expected) < 1e-5


def test_loss_on_the_answer_only():
    data = random_examples([20, 31, 9], loss_starts=[7, 30, 9])  # the last one has no answer left
    model = adapted_model(ATTENTION)
    expected, norms = reference_sum(model, data, 1e-3)
    assert norms[2] == 0
    total, _ = clipped_sum(model, data, 1e-3, budget=62)
    assert relative_error(total, expected) < 1e-5


@pytest.mark.parametrize("clip_function", ["flat", "automatic"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("normalization", ["max_seq_len", "tokens"])
@pytest.mark.parametrize("rank", [4, 64])  # mostly instantiated; mostly ghost norms
def test_dropping_one_example_moves_the_sum_by_at_most_the_clip_norm(
    clip_function, checkpointing, normalization, rank
):
    clip_norm = 1e-3  # far below every norm, so each example fills its bound
    data = random_examples([3, 50, 17, 29, 50, 8])
    model = adapted_model("all-linear", checkpointing=checkpointing, rank=rank)
    everyone = np.arange(len(data))
    options = {"clip_function": clip_function, "budget": 100, "normalization": normalization}
    full, _ = clipped_sum(model, data, clip_norm, indices=everyone, **options)
    for dropped in everyone:
        rest, _ = clipped_sum(
            model, data, clip_norm, indices=np.delete(everyone, dropped), **options
        )
        moved = (full.double() - rest.double()).norm().item()
        assert moved <= clip_norm * (1 + 1e-5)
        assert moved >= 0.5 * clip_norm


def test_released_sum_moves_by_at_most_the_clip_norm_under_the_same_noise():
    clip_norm = 0.01
    data = random_examples([12, 30, 7])
    model = adapted_model(ATTENTION)
    released = []
    for indices in (np.arange(3), np.arange(2)):
        total, _ = clipped_sum(model, data, clip_norm, indices=indices)
        released.append(add_noise(total, 1.0, clip_norm, SecureRandom.insecure_fixed(1, "noise")))
    rounding = grid_spacing(clip_norm) * total.numel() ** 0.5
    assert 0 < (released[0] - released[1]).norm() <= clip_norm * (1 + 1e-5) + rounding


@pytest.mark.parametrize("rank", [4, 32])  # instantiated; ghost norms
def test_a_non_finite_example_contributes_exactly_zero(rank):
    data = random_examples([10, 10, 12])
    model = adapted_model(ATTENTION, rank=rank)
    clean, _ = clipped_sum(model, data, 0.1, indices=np.array([0, 2]), budget=10_000)
    with torch.no_grad():  # one token's embedding is poisoned, and only example 1 has that token
        data.ids[data.offsets[1] + 3] = 258
        assert np.count_nonzero(data.ids == 258) == 1
        model.get_input_embeddings().weight[258] = float("nan")
    poisoned, norms = clipped_sum(model, data, 0.1, budget=10_000)
    assert torch.isfinite(poisoned).all()
    assert torch.isfinite(norms).tolist() == [True, False, True]
    assert relative_error(poisoned, clean.double()) < 1e-5


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5, 1.0, 7.0, 1e30])
@pytest.mark.parametrize("clip_function", ["flat", "automatic"])
def test_factors_bound_every_norm(norm, clip_function):
    norms = torch.tensor([norm, float("nan"), float("inf")])
    factors = clip_factors(norms, 1.0, clip_function)
    assert factors[0] * norm <= 1 + 1e-6
    assert factors[1:].tolist() == [0, 0]
    if clip_function == "flat":
        assert factors[0] == 1 or norm > 1


def noise_p_value(scale: float) -> float:
    """Two-sided chi-square p-value of the noise of 100,000 coordinates, its deviation scaled."""
    clipped = torch.linspace(-1, 1, 100_000)
    noised = add_noise(clipped, 0.8, 0.5, SecureRandom())
    statistic = (((noised - clipped.double()) * scale / (0.8 * 0.5)) ** 2).sum().item()
    tail = stats.chi2(clipped.numel()).cdf(statistic)
    return 2 * min(tail, 1 - tail)


def test_noise_has_the_variance_that_was_accounted_and_a_wrong_scale_is_rejected():
    assert noise_p_value(1.0) > 1e-6
    for wrong in (0.98, 1.02, 0.5):
        assert noise_p_value(wrong) < 1e-6


def test_noise_is_fresh_at_every_call_and_lies_on_the_grid():
    random = SecureRandom()
    first, second = (add_noise(torch.zeros(50_000), 1.0, 1.0, random) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 50_000**0.5
    steps = first / grid_spacing(1.0)
    assert torch.equal(steps, steps.round())


def test_microbatches_do_not_change_who_takes_part():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    drawn = np.flatnonzero(np.random.default_rng(1).random(500) < 0.3)
    for ranks in (1, 2, 4):
        parts = cut_microbatches(drawn, lengths, 120, ranks)
        together = np.concatenate([part.examples for rank in parts for part in rank])
        assert sorted(together) == list(drawn)


def test_uncovered_tensors_are_refused_by_name():
    model = adapted_model(ATTENTION)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UsageError, match="norm.weight"):
        PerExampleGradients(model)
    with pytest.raises(UsageError, match="no trainable"):
        PerExampleGradients(model.requires_grad_(False))


def test_a_shared_adapter_is_refused():
    model = adapted_model(["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(UsageError, match="shared by 2 layers"):
        PerExampleGradients(model)


def test_a_layer_that_is_skipped_is_named():
    model = adapted_model(["q_proj"])
    gradients = PerExampleGradients(model)
    with pytest.raises(RuntimeError, match=r"no per-example gradient for .*lora_A"):  # noqa: SIM117
        with gradients.capture(1):
            pass


def test_a_layer_used_twice_or_on_flattened_examples_is_refused():
    layer = torch.nn.Linear(4, 3, bias=False)
    gradients = PerExampleGradients(torch.nn.ModuleDict({"layer": layer}))
    for inputs, message in (
        (torch.ones(2, 5, 4), "used twice"),
        (torch.ones(10, 4), "per-example gradients need"),
        (torch.ones(5, 2, 4), "per-example gradients need"),
    ):
        with pytest.raises(RuntimeError, match=message), gradients.capture(2):
            (layer(inputs) + layer(inputs)).sum().backward()


def test_no_ordinary_weight_gradient_is_computed_and_hooks_are_idle_outside():
    model = adapted_model(ATTENTION)
    clipped_sum(model, random_examples([5, 6]), 1.0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == 16


def test_flat_gradients_are_cut_back_into_place():
    parameters = {
        "a": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Parameter(torch.zeros(4)),
    }  # fmt: skip
    assign_gradient(parameters, torch.arange(10.0))
    assert parameters["a"].grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parameters["b"].grad.tolist() == [6, 7, 8, 9]


def test_the_norm_of_a_long_gradient_is_exact():
    """A float32 sum over two million squares is off by more than the bound on an example allows."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(2048, 1024, bias=False)
    gradients = PerExampleGradients(layer)
    inputs = torch.randn(2, 4096, 2048, generator=generator)
    outputs = torch.randn(2, 4096, 1024, generator=generator)
    with gradients.capture(2):
        layer(inputs).backward(outputs)
    flat = (outputs.transpose(1, 2) @ inputs).flatten(1).double()
    total = torch.zeros(gradients.num_parameters)
    norms = gradients.add_clipped_sum(total, 1.0, "flat")
    assert torch.allclose(norms.double(), flat.norm(dim=1), rtol=1e-6)
