"""Exposure of canaries: how far a model's losses give their secrets away.

Carlini et al. 2019, "The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural
Networks", definition 4 with the ranks among a sample of candidates (section 4.3).
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from utils.texts.canaries import DIGITS


def exposures(losses: np.ndarray, candidate_losses: np.ndarray) -> np.ndarray:
    """Exposure in bits: log2 of the number of candidates less log2 of the rank among them.

    A canary is ranked among the candidates and itself, 1 for the lowest loss. Of the ranks that
    ties allow, the mean of log2 is taken, as though ties were broken by chance.

    Args:
        losses: summed token losses [canaries].
        candidate_losses: those of other secrets in the same template [candidates].

    Returns:
        float64 [canaries], between 0 and log2(candidates + 1).
    """
    ordered = np.sort(candidate_losses)
    better, up_to = (np.searchsorted(ordered, losses, side) for side in ("left", "right"))
    # log2(1 · 2 ··· n) for every n, from which means over ranges of ranks are differences.
    sums = np.concatenate([[0], np.cumsum(np.log2(np.arange(1, len(ordered) + 2)))])
    mean_log_rank = (sums[up_to + 1] - sums[better]) / (up_to + 1 - better)
    return np.log2(len(ordered) + 1) - mean_log_rank


def exposure_by_chance(num_candidates: int) -> float:
    """The mean exposure where every rank is as likely: near 1 / ln 2 = 1.44 bits."""
    count = num_candidates + 1
    return math.log2(count) - math.lgamma(count + 1) / math.log(2) / count


def secrets_found(texts: Iterable[str], secrets: list[str]) -> np.ndarray:
    """float64 [secrets]: 1 for each secret whose digits stand in a text, in a row."""
    wanted, found = set(secrets), set()
    # A look-ahead, so that a longer row of digits gives every window of it.
    window = re.compile(rf"(?=([0-9]{{{DIGITS}}}))")
    for text in texts:
        found |= wanted.intersection(window.findall(text))
    return np.array([secret in found for secret in secrets], dtype=np.float64)
