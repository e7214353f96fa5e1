"""How a logical batch is cut into microbatches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import adapted_model, random_examples, relative_error, tiny_model
from utils.dp_utils import PerExampleGradients
from utils.models.footprint import LLAMA, Training
from utils.models.language_model import LanguageModel
from utils.models.losses import normalise
from utils.runs import batching
from utils.runs.batching import MICROBATCH_TOKENS, ON_A_CPU, Cost, Halving, Microbatch, Shapes


def cut_microbatches(*arguments):
    """The examples of each microbatch, for each rank."""
    ranks = batching.cut_microbatches(*arguments)
    return [[part.examples for part in rank] for rank in ranks]


def test_microbatches_keep_the_budget_and_waste_little():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(4.3, 0.9, 20_000).astype(int) + 1, 1024)
    drawn = np.flatnonzero(random.random(20_000) < 0.2)
    (batches,) = cut_microbatches(drawn, lengths, 4 * 1024)
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(padded) <= 4 * 1024
    assert sum(padded) / lengths[drawn].sum() < 1.03
    assert lengths[batches[0]].max() == lengths[drawn].max()


def padded_tokens(batches, lengths):
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@pytest.mark.parametrize(
    "one_costs", [ON_A_CPU, Cost(1280), Cost(900, overlaps=True)], ids=["cpu", "sum", "longer"]
)
def test_no_other_cut_costs_less(one_costs):
    def least(sizes, budget):
        """By trying every way to cut."""
        costs = [0]
        for end in range(1, len(sizes) + 1):
            costs.append(
                min(
                    costs[start] + one_costs.of(sizes[start] * (end - start))
                    for start in range(end)
                    if sizes[start] * (end - start) <= budget
                )
            )
        return costs[-1]

    random = np.random.default_rng(0)
    for budget in (300, 700, 2000):
        lengths = random.integers(1, 300, 60)
        (batches,) = cut_microbatches(np.arange(60), lengths, budget, 1, None, one_costs)
        padded = [padded_tokens([batch], lengths) for batch in batches]
        assert one_costs.of(padded).sum() == least(sorted(lengths, reverse=True), budget)


def test_a_small_logical_batch_is_hardly_padded():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.3, 0.9, 96).astype(int) + 1, 1024)
    (batches,) = cut_microbatches(np.arange(96), lengths, 4 * 1024)
    assert padded_tokens(batches, lengths) / lengths.sum() < 1.12


def test_what_fits_into_one_microbatch_is_shared_all_the_same():
    lengths = np.full(64, 100)
    parts = cut_microbatches(np.arange(64), lengths, 16 * 1024, 4)
    assert [padded_tokens(rank, lengths) for rank in parts] == [1600] * 4
    assert len(cut_microbatches(np.arange(64), lengths, 16 * 1024)[0]) == 1


def test_ranks_are_balanced_and_may_be_empty():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 5000)
    parts = cut_microbatches(np.arange(5000), lengths, 400, 4)
    loads = [sum(len(batch) * lengths[batch].max() for batch in rank) for rank in parts]
    assert max(loads) / min(loads) < 1.02
    assert cut_microbatches(np.arange(0), lengths, 400, 2) == [[], []]
    assert [len(rank) for rank in cut_microbatches(np.arange(1), lengths, 400, 3)] == [1, 0, 0]


def test_an_example_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="exceeds the budget"):
        cut_microbatches(np.arange(2), np.array([5, 50]), 20)


# ---------------------------------------------------------------- shapes that lengths alone decide

MAX_SEQ_LEN = 1024
FIXED = Shapes(MAX_SEQ_LEN, token_budget=4 * MAX_SEQ_LEN, tokens=512)
FREE = replace(FIXED, tokens=None)


def lognormal_lengths(count, seed=0):
    """Of mean 190 or so, as instructions with answers are."""
    random = np.random.default_rng(seed)
    return np.minimum(random.lognormal(4.9, 0.9, count).astype(int) + 1, MAX_SEQ_LEN)


@pytest.mark.parametrize("share", batching.GRID_SHARES)
@pytest.mark.parametrize("max_seq_len", [1, 7, 100, 1000, 1024])
def test_a_padded_length_is_little_more_than_the_length_and_grows_with_it(max_seq_len, share):
    lengths = np.arange(max_seq_len + 1)
    padded = Shapes(max_seq_len, 10**6, None, share=share).padded(lengths)
    assert padded.max() == max_seq_len
    assert (padded >= np.maximum(lengths, 1)).all()
    assert (np.diff(padded) >= 0).all()
    more = padded - lengths
    assert (more[1:] < np.maximum(batching.GRID_STEP, lengths[1:] * share)).all()
    if share == 1 and max_seq_len > 1000:
        assert set(padded[1:1000]) == {8, 16, 32, 64, 128, 256, 512, max_seq_len}


def test_a_padded_length_depends_on_the_examples_own_length_alone():
    lengths = lognormal_lengths(300)
    together = FIXED.padded(lengths)
    assert together.tolist() == [int(FIXED.padded(np.array([each]))[0]) for each in lengths]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_fixed_number_of_rows_follows_from_the_padded_length_whatever_else_is_drawn(
    seed, num_ranks
):
    lengths = lognormal_lengths(500)
    random = np.random.default_rng(seed)
    drawn = np.flatnonzero(random.random(500) < random.random())
    ranks = batching.cut_microbatches(drawn, lengths, FIXED.token_budget, num_ranks, FIXED)
    parts = [part for rank in ranks for part in rank]
    assert sorted(np.concatenate([part.examples for part in parts])) == drawn.tolist()
    for part in parts:
        assert set(FIXED.padded(lengths[part.examples])) == {part.tokens}
        assert part.rows == FIXED.rows(part.tokens) == max(1, 512 // part.tokens)
        assert len(part.examples) <= part.rows


def test_free_rows_are_as_many_as_there_are_and_fit_the_budget():
    lengths = lognormal_lengths(500)
    (parts,) = batching.cut_microbatches(np.arange(500), lengths, FREE.token_budget, 1, FREE)
    assert all(part.rows == len(part.examples) for part in parts)
    assert max(part.rows * part.tokens for part in parts) <= FREE.token_budget
    for part in parts:
        assert set(FREE.padded(lengths[part.examples])) == {part.tokens}


@pytest.mark.parametrize("shapes", [replace(FIXED, tokens=1024), FREE], ids=["fixed", "free"])
def test_shapes_waste_little(shapes):
    lengths = lognormal_lengths(4096)
    assert 180 < lengths.mean() < 200
    (parts,) = batching.cut_microbatches(
        np.arange(4096), lengths, shapes.token_budget, shapes=shapes
    )
    assert sum(part.rows * part.tokens for part in parts) / lengths.sum() <= 1.08


def cost_of_parts(parts, one_costs):
    return one_costs.of([part.rows * part.tokens for part in parts]).sum()


def cost_of_all(shapes, lengths, one_costs):
    """Of a logical batch's microbatches."""
    (parts,) = batching.cut_microbatches(
        np.arange(len(lengths)), lengths, shapes.token_budget, shapes=shapes
    )
    return cost_of_parts(parts, one_costs)


@pytest.mark.parametrize("tokens", [512, None], ids=["fixed", "free"])
@pytest.mark.parametrize("overlaps", [False, True], ids=["sum", "longer"])
@pytest.mark.parametrize("launching", [200, 2000, 20_000])
@pytest.mark.parametrize("num_rows", [64, 256, 4096])
def test_the_cheapest_shapes_are_about_the_cheapest(tokens, launching, overlaps, num_rows):
    """Of batches with as many texts in every octave, which is what they are chosen for."""
    least = replace(FIXED, token_budget=16 * MAX_SEQ_LEN, tokens=tokens)
    random = np.random.default_rng(num_rows)
    lengths = (2 ** random.uniform(3, 10, num_rows)).astype(int)
    sizes = [512 << doubling for doubling in range(6)] if tokens else [None]
    one_costs = Cost(launching, overlaps)
    costs = {
        shapes: cost_of_all(shapes, lengths, one_costs)
        for share in batching.GRID_SHARES
        for shapes in (replace(least, share=share, tokens=size) for size in sizes)
    }
    chosen = batching.cheapest_shapes(least, num_rows, one_costs)
    assert costs[chosen] <= 1.1 * min(costs.values())


@pytest.mark.parametrize("max_seq_len", [1, 5, 8, 9])
def test_the_cheapest_shapes_of_the_shortest_texts_grow_with_the_batch(max_seq_len):
    least = Shapes(max_seq_len, 1024 * max_seq_len, tokens=max_seq_len)
    few, many = (batching.cheapest_shapes(least, rows, Cost(100)) for rows in (1, 4096))
    assert few.tokens < many.tokens <= least.token_budget


def test_all_of_a_budget_may_be_fixed():
    longest = Shapes(400, 16 * 400, tokens=512)
    assert batching.cheapest_shapes(longest, 10**5, Cost(10**4)).tokens == 16 * 400


@pytest.mark.parametrize("shapes", [None, replace(FREE, share=1.0)], ids=["none", "free"])
@pytest.mark.parametrize("num_rows", [64, 256])
def test_more_ranks_are_no_slower_where_launches_take_the_time(num_rows, shapes):
    lengths, one_costs = lognormal_lengths(num_rows), Cost(6000, overlaps=True)

    def slowest(num_ranks):
        ranks = batching.cut_microbatches(
            np.arange(num_rows), lengths, 16 * MAX_SEQ_LEN, num_ranks, shapes, one_costs
        )
        return max(cost_of_parts(rank, one_costs) for rank in ranks)

    times = [slowest(num_ranks) for num_ranks in (1, 2, 4)]
    assert times == sorted(times, reverse=True)


def cost_on_a_gpu(num_layers, num_parameters, dtype=torch.bfloat16):
    return batching.cost_on("cuda", dtype, num_layers, num_parameters)


def test_the_cheapest_shapes_are_coarse_where_launches_take_the_time():
    """Of an H200 it was measured: 83 microbatches of 256 instructions took six times as long as 20
    without privacy."""
    of_a_small_one = cost_on_a_gpu(22, 1_200_000_000)
    assert 8000 < of_a_small_one.launching < 9000
    lengths = lognormal_lengths(256)
    chosen = batching.cheapest_shapes(FIXED, 256, of_a_small_one)
    before, now = (cost_of_all(shapes, lengths, of_a_small_one) for shapes in (FIXED, chosen))
    assert now < 0.5 * before
    assert 500 < cost_on_a_gpu(80, 70_000_000_000).launching < 550
    assert cost_on_a_gpu(22, 1_200_000_000, torch.float32).launching < of_a_small_one.launching / 5
    assert cost_on_a_gpu(1, 10**12).launching == MICROBATCH_TOKENS
    assert batching.cost_on("cpu", torch.bfloat16, 22, 1_200_000_000) == ON_A_CPU


def test_the_cost_of_a_microbatch_on_a_gpu_is_what_was_measured():
    """Milliseconds of microbatches of 440 and of 4,096 padded tokens: 153 and 163."""
    tokens = np.array([440, 4096])
    seconds = cost_on_a_gpu(22, 1_200_000_000).of(tokens) * 4 * 1.2e9 / batching.HALF_FLOPS
    assert seconds == pytest.approx([0.153, 0.163], rel=0.06)


# ---------------------------------------------------------------- empty rows


def test_rows_and_tokens_beyond_the_examples_are_empty():
    data = random_examples([5, 9, 3], loss_starts=[1, 2, 0])
    batch = data.collate(np.array([2, 0]), 7, rows=4, tokens=8)
    assert batch["lengths"].tolist() == [3, 5, 0, 0]
    assert batch["loss_starts"].tolist() == [0, 1, 0, 0]
    assert batch["input_ids"].shape == (4, 8)
    assert batch["input_ids"][1, :5].tolist() == data.ids[:5].tolist()
    assert (batch["input_ids"][0, 3:] == 7).all()
    assert (batch["input_ids"][2:] == 7).all()


def sums_and_norms(model, data, clip_function, rows):
    """Clipped sum [parameters] of a microbatch of so many rows, and the norms [rows]."""
    for module in model.modules():
        module._forward_hooks.clear()
    gradients = PerExampleGradients(model)
    batch = data.collate(np.arange(len(data)), 0, rows=rows)
    total = torch.zeros(gradients.num_parameters)
    with gradients.capture(rows):
        sums, counts = LanguageModel(model.get_base_model()).example_losses(batch)
        normalise(sums, counts, "tokens", 64).sum().backward()
    return total, gradients.add_clipped_sum(total, 1.0, clip_function)


@pytest.mark.parametrize("clip_function", ["flat", "automatic"])
@pytest.mark.parametrize("tokens", [3, 30], ids=["ghost norms", "instantiated"])
@pytest.mark.parametrize("model_type", ["llama", "bloom"], ids=["no mask", "mask"])
def test_empty_rows_add_exactly_zero(model_type, tokens, clip_function):
    base = tiny_model(model_type)
    targets = ["q_proj", "v_proj"] if model_type == "llama" else ["query_key_value"]
    model = adapted_model(targets, base=base)
    assert LanguageModel(base).needs_mask is (model_type == "bloom")
    nobody = random_examples([tokens], loss_starts=[tokens])
    total, norms = sums_and_norms(model, nobody, clip_function, 5)
    assert torch.equal(total, torch.zeros_like(total))
    assert torch.equal(norms, torch.zeros(5))
    data = random_examples([tokens, tokens - 1, tokens])
    alone, _ = sums_and_norms(model, data, clip_function, 3)
    padded, norms = sums_and_norms(model, data, clip_function, 8)
    assert (norms[3:] == 0).all()
    assert (norms[:3] > 0).all()
    assert relative_error(padded, alone.double()) < 1e-6


# ---------------------------------------------------------------- memory of short rows

# LoRA of a 13B model: rank 8 on q, k, v, o, and rank 64 on all linear layers with checkpointing.
THIRTEEN = {
    8: Training(architecture=LLAMA["13b"], rank=8, max_seq_len=MAX_SEQ_LEN).row,
    64: Training(
        architecture=LLAMA["13b"], rank=64, max_seq_len=MAX_SEQ_LEN,
        target_modules=("all-linear",), gradient_checkpointing=True,
    ).row,
}  # fmt: skip


@pytest.mark.parametrize("rank", THIRTEEN)
@pytest.mark.parametrize("kind", [FIXED, FREE], ids=["fixed", "free"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_microbatch_takes_more_than_one_of_the_greatest_length(rank, kind, num_ranks):
    memory = THIRTEEN[rank]
    shapes = replace(kind, memory=memory, tokens=kind.tokens and 4 * MAX_SEQ_LEN)
    lengths = np.concatenate([lognormal_lengths(500), np.arange(1, 1025), np.full(2000, 7)])
    indices = np.arange(len(lengths))
    ranks = batching.cut_microbatches(indices, lengths, shapes.token_budget, num_ranks, shapes)
    parts = [part for rank in ranks for part in rank]
    assert sorted(np.concatenate([part.examples for part in parts])) == indices.tolist()
    whole = 4 * memory.of(MAX_SEQ_LEN)
    assert max(part.rows * memory.of(part.tokens) for part in parts) <= whole
    # Without the bound the gradients alone of the shortest rows would take more at rank 64.
    shortest = min(part.tokens for part in parts)
    without = shapes.token_budget // shortest * memory.kept(shortest)
    assert (without > 1.5 * whole) is (rank == 64)
    # And it costs little where gradients are small.
    assert max(part.rows for part in parts) > {8: 300, 64: 10}[rank]


def test_a_bound_on_memory_leaves_the_number_of_rows_to_the_padded_length():
    shapes = replace(FIXED, memory=THIRTEEN[64], tokens=4096)
    lengths = lognormal_lengths(500)
    random = np.random.default_rng(0)
    rows: dict[int, set[int]] = {}
    for _ in range(5):
        drawn = np.flatnonzero(random.random(500) < random.random())
        (parts,) = batching.cut_microbatches(drawn, lengths, FIXED.token_budget, 1, shapes)
        for part in parts:
            rows.setdefault(part.tokens, set()).add(part.rows)
            assert part.rows == shapes.rows(part.tokens)
    assert all(len(found) == 1 for found in rows.values())


def test_without_gradients_to_keep_the_budget_of_tokens_is_the_only_bound():
    for padded in (1, 8, 17, 100, 1000, 1024):
        assert FREE.most_rows(padded) == FREE.token_budget // padded


# ---------------------------------------------------------------- halves


def pass_all(halving, parts, fits):
    """Those that passed, where `fits` says which do."""
    passed = []

    def attempt(part):
        if not fits(part):
            raise torch.OutOfMemoryError("pretended")
        return part

    for whole in parts:
        passed += [part for part, result in halving.passes(whole, attempt) if part is result]
    return passed


@pytest.mark.parametrize("shapes", [None, FREE, FIXED], ids=["plain", "free", "fixed"])
@pytest.mark.parametrize("seed", range(4))
def test_each_example_passes_once_and_in_order_whatever_runs_out(shapes, seed):
    random = np.random.default_rng(seed)
    lengths = lognormal_lengths(300)
    (parts,) = batching.cut_microbatches(
        np.flatnonzero(random.random(300) < 0.5), lengths, 4096, 1, shapes
    )
    for fits in (
        lambda part: part.rows * part.tokens <= 1024,
        lambda part: part.rows == 1 or random.random() < 0.4,
        lambda part: part.rows == 1,
    ):
        passed = pass_all(Halving(shapes), parts, fits)
        in_order = np.concatenate([part.examples for part in passed])
        assert in_order.tolist() == np.concatenate([part.examples for part in parts]).tolist()
        for part in passed:
            assert 0 < len(part.examples) <= part.rows
            assert shapes is FIXED or len(part.examples) == part.rows


def test_a_half_of_a_fixed_number_of_rows_has_half_of_them_and_none_of_empty_rows_alone():
    part = Microbatch(np.arange(5), rows=8, tokens=16)
    few = Microbatch(np.arange(3), rows=8, tokens=16)
    halving = Halving(FIXED)
    passed = pass_all(halving, [part, few], lambda part: part.rows <= 4)
    assert [(p.examples.tolist(), p.rows) for p in passed] == [([0, 1, 2, 3], 4), ([4], 4),
                                                               ([0, 1, 2], 4)]  # fmt: skip


def test_what_has_run_out_once_is_not_tried_again_and_is_said_once(capsys):
    halving, tried = Halving(FREE), []
    assert not halving.has_halved
    parts = [Microbatch(np.arange(8), 8, 16) for _ in range(3)]
    parts.append(Microbatch(np.arange(8), 8, 8))

    def fits(part):
        tried.append((part.rows, part.tokens))
        return part.rows <= 2

    pass_all(halving, parts, fits)
    assert [rows for rows, tokens in tried if tokens == 16] == [8, 4, *[2] * 12]
    assert [rows for rows, tokens in tried if tokens == 8] == [8, 4, *[2] * 4]
    assert halving.has_halved
    assert capsys.readouterr().err == batching.OUT_OF_MEMORY + "\n"


def test_a_row_alone_that_does_not_fit_is_an_error_and_so_is_any_where_others_wait():
    passed, four = [], Microbatch(np.arange(4), 4, 16)

    def attempt(part):
        if part.rows > 1 or part.examples[0] == 1:
            raise torch.OutOfMemoryError("pretended")
        passed.append(part.examples.tolist())

    with pytest.raises(torch.OutOfMemoryError):
        list(Halving(FREE).passes(four, attempt))
    assert passed == [[0]]
    with pytest.raises(torch.OutOfMemoryError):
        list(Halving(FREE, may_halve=False).passes(four, attempt))
    assert passed == [[0]]
