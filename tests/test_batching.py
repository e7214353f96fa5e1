"""Who takes part in a step, and how a step is cut into microbatches."""

import numpy as np
import pytest

from privacy_checks.randomness import adjacent_p_value, batch_size_p_value, count_p_value
from utils.runs.batching import MICROBATCH_TOKENS, cut_microbatches, poisson_batch, shuffled_batch
from utils.secure_random import SecureRandom

N, BATCH, STEPS = 400, 60, 600
TINY_PROBABILITY = 1e-6


def draw_matrix(draw) -> np.ndarray:
    """bool [steps, examples]: who was in which batch."""
    taken = np.zeros((STEPS, N), dtype=bool)
    for step in range(STEPS):
        taken[step, draw(step)] = True
    return taken


def poisson(_step):
    return poisson_batch(N, BATCH, SecureRandom())


def shuffler(step):
    return shuffled_batch(N, BATCH, seed=1, step=step)


def fixed_size(_step):
    return np.random.default_rng().choice(N, BATCH, replace=False)


def p_values(draw) -> list[float]:
    """Of the batch sizes, of each example's count, and of adjacent batches."""
    taken = draw_matrix(draw)
    tests = (batch_size_p_value, count_p_value, adjacent_p_value)
    return [test(taken, BATCH / N) for test in tests]


def test_poisson_draws_fit_the_binomial_in_size_count_and_time():
    assert min(p_values(poisson)) > TINY_PROBABILITY


def test_shuffled_epochs_fail_every_one_of_these():
    assert max(p_values(shuffler)) < TINY_PROBABILITY


def test_batches_of_a_fixed_size_fail_the_size_test():
    assert p_values(fixed_size)[0] < TINY_PROBABILITY


def test_poisson_takes_all_at_rate_one_and_may_take_none():
    assert poisson_batch(50, 50, SecureRandom()).tolist() == list(range(50))
    sizes = [len(poisson_batch(1000, 1, SecureRandom())) for _ in range(100)]
    assert 0 in sizes


def test_shuffled_batches_cover_each_epoch_once_and_depend_on_seed_and_step_alone():
    epoch = np.concatenate([shuffled_batch(30, 7, 3, step) for step in range(30)])
    assert len(epoch) == 210
    for start in range(0, 210, 30):
        assert sorted(epoch[start : start + 30]) == list(range(30))
    assert np.array_equal(shuffled_batch(30, 7, 3, 11), shuffled_batch(30, 7, 3, 11))
    assert not np.array_equal(shuffled_batch(30, 7, 3, 11), shuffled_batch(30, 7, 4, 11))


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
