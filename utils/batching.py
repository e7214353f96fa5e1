"""Logical batches (who takes part in a step) and microbatches (what is computed at once)."""

import numpy as np

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


def cut_microbatches(
    indices: np.ndarray, lengths: np.ndarray, token_budget: int, num_ranks: int = 1
) -> list[list[np.ndarray]]:
    """Cut a logical batch into microbatches of similar lengths, and deal them to ranks.

    Examples are sorted by length, the longest first (so that a budget that does not fit shows at
    once), and cut where the padded tokens (examples · longest) would pass the budget. Each
    microbatch then goes to the rank with the fewest padded tokens so far.

    Args:
        indices: int64, the logical batch.
        lengths: int [num_examples], tokens of every example of the data set.
        token_budget: padded tokens per microbatch; at least the longest example's.

    Returns:
        For each rank a list of int64 index arrays; an empty list for a rank without examples.
    """
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    sizes = lengths[order]
    ranks: list[list[np.ndarray]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    start = 0
    while start < len(order):
        longest = int(sizes[start])
        if longest > token_budget:
            raise ValueError(f"an example of {longest} tokens exceeds the budget {token_budget}")
        count = token_budget // longest
        rank = loads.index(min(loads))
        ranks[rank].append(order[start : start + count])
        loads[rank] += longest * len(ranks[rank][-1])
        start += count
    return ranks
