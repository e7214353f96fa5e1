"""Microbatches: what of a logical batch is computed at once, and on which process."""

import numpy as np

# What a microbatch costs besides its padded tokens (reading the weights, launching kernels), as a
# number of tokens.
MICROBATCH_TOKENS = 128
# At least so many microbatches a rank, that they can be dealt out evenly.
MICROBATCHES_PER_RANK = 8


def cut_microbatches(
    indices: np.ndarray, lengths: np.ndarray, token_budget: int, num_ranks: int = 1
) -> list[list[np.ndarray]]:
    """Cut a logical batch into microbatches of similar lengths, and deal them to ranks.

    Examples are sorted by length, the longest first (so that a budget that does not fit shows at
    once), and cut where that makes the sum of padded tokens (examples · longest) and of what
    each microbatch costs besides them least; no microbatch passes the budget. Each then goes to
    the rank with the fewest padded tokens so far.

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
    if not len(order):
        return ranks
    longest = int(sizes[0])
    if longest > token_budget:
        raise ValueError(f"an example of {longest} tokens exceeds the budget {token_budget}")
    if num_ranks > 1:
        share = int(sizes.sum()) // (num_ranks * MICROBATCHES_PER_RANK)
        token_budget = min(token_budget, max(longest, share))
    loads = [0] * num_ranks
    for start, end in _cheapest_cuts(sizes, token_budget):
        rank = loads.index(min(loads))
        ranks[rank].append(order[start:end])
        loads[rank] += int(sizes[start]) * (end - start)
    return ranks


def _cheapest_cuts(sizes: np.ndarray, token_budget: int) -> list[tuple[int, int]]:
    """Start and end of each microbatch of a descending sequence of lengths.

    The least cost of all from example i on is, over the j that the budget allows, the least of
    sizes[i] · (j - i) + MICROBATCH_TOKENS + the least cost from j on.
    """
    costs = np.zeros(len(sizes) + 1, dtype=np.int64)
    ends = np.zeros(len(sizes), dtype=np.int64)
    counts = np.arange(1, token_budget // int(sizes[-1]) + 1)
    for start in range(len(sizes) - 1, -1, -1):
        size = int(sizes[start])
        most = min(len(sizes) - start, token_budget // size)
        candidates = costs[start + 1 : start + 1 + most] + size * counts[:most]
        best = int(candidates.argmin())
        costs[start] = candidates[best] + MICROBATCH_TOKENS
        ends[start] = start + 1 + best
    cuts, start = [], 0
    while start < len(sizes):
        cuts.append((start, int(ends[start])))
        start = cuts[-1][1]
    return cuts
