"""How a logical batch is cut into microbatches."""

import numpy as np
import pytest

from utils.runs import batching
from utils.runs.batching import MICROBATCH_TOKENS


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


def test_no_other_cut_costs_less():
    def least(sizes, budget):
        """By trying every way to cut."""
        costs = [0]
        for end in range(1, len(sizes) + 1):
            costs.append(
                min(
                    costs[start] + sizes[start] * (end - start) + MICROBATCH_TOKENS
                    for start in range(end)
                    if sizes[start] * (end - start) <= budget
                )
            )
        return costs[-1]

    random = np.random.default_rng(0)
    for budget in (300, 700, 2000):
        lengths = random.integers(1, 300, 60)
        (batches,) = cut_microbatches(np.arange(60), lengths, budget)
        cost = padded_tokens(batches, lengths) + MICROBATCH_TOKENS * len(batches)
        assert cost == least(sorted(lengths, reverse=True), budget)


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
