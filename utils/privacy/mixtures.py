"""One sampled step about a unit of several rows, for a PLD accountant. No torch.

The rows of a unit are drawn one by one, so k ~ Binomial(K, q) of them take part, and the worst are
equal: P = sum_k p_k N(k, s²) against Q = N(0, s²) dominate the step (Choquette-Choo et al. 2023,
corollary 4.7). dp-accounting has the same distribution and inverts its loss point by point, which
takes 8 s where a calibration needs ten of them; here Newton's method inverts all points at once.
"""

from functools import cached_property

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom, norm

# Probability that a distribution may leave out at either end; it counts as an infinite loss.
TAIL = 1e-22
# Points from which Newton's method starts, and its steps: the loss bends on the scale of s.
STARTS, NEWTON_STEPS = 4096, 4
# Points at which all terms of the mixture are held at once.
BLOCK = 1 << 14


class MixtureStep:
    """P and Q of a step, over y = x / s.

    Args:
        sampling_rate: q, below 1.
        noise_multiplier: s.
        rows: K.
    """

    def __init__(self, sampling_rate: float, noise_multiplier: float, rows: int):
        counts = np.arange(rows + 1)
        self._shifts = counts / noise_multiplier
        self._log_weights = binom.logpmf(counts, rows, sampling_rate)
        self._lowest = -float(norm.isf(TAIL))
        # The farthest point that any component reaches with a probability above TAIL.
        reach = norm.isf(np.exp(np.minimum(0.0, np.log(TAIL) - self._log_weights)))
        self._highest = float(np.max(self._shifts + reach))

    @cached_property
    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Points over all that matters, and the losses there."""
        points = np.linspace(self._lowest, self._highest, STARTS)
        return points, self._losses(points)[0]

    def spread(self) -> tuple[float, float]:
        """Length of the range of losses, and their variance at most, about 0, under P."""
        points, losses = self._starts
        density = np.exp(losses - points**2 / 2) / np.sqrt(2 * np.pi)
        variance = np.sum(density * losses**2) * (points[1] - points[0])
        return float(losses[-1] - losses[0]), float(variance)

    def distribution(self, interval: float) -> PrivacyLossDistribution:
        """The pessimistic distribution of the loss on a grid ("connect the dots").

        Doroshenko et al. 2022; like dp-accounting's `from_mixture_gaussian_mechanism`.
        """
        _, losses = self._starts
        highest = self._losses(np.array([-self._lowest]))[0][0]
        return PrivacyLossDistribution(
            self._on_grid(losses[0], losses[-1], interval, self._removing),
            self._on_grid(-highest, -losses[0], interval, self._adding),
        )

    @staticmethod
    def _on_grid(low, high, interval, delta_of) -> PLDPmf:
        first, last = int(np.floor(low / interval)), int(np.ceil(high / interval))
        deltas = np.clip(delta_of(np.arange(first, last + 1) * interval), 0.0, 1.0)
        return create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)

    def _removing(self, epsilons: np.ndarray) -> np.ndarray:
        """P(y > y*) - e^eps Q(y > y*), where the loss ln P/Q passes eps at y*."""
        points = self._inverse(epsilons)
        above = sum(
            np.exp(weight) * ndtr(shift - points)
            for weight, shift in zip(self._log_weights, self._shifts)
        )
        return above - np.exp(epsilons + log_ndtr(-points))

    def _adding(self, epsilons: np.ndarray) -> np.ndarray:
        """Q(y < y*) - e^eps P(y < y*), where the loss ln Q/P passes eps at y*."""
        points = self._inverse(-epsilons)
        below = sum(
            np.exp(epsilons + weight + log_ndtr(points - shift))
            for weight, shift in zip(self._log_weights, self._shifts)
        )
        return ndtr(points) - below

    def _losses(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln P/Q at [points], and its slope."""
        losses, slopes = np.empty_like(points), np.empty_like(points)
        for start in range(0, len(points), BLOCK):
            block = slice(start, start + BLOCK)
            terms = np.multiply.outer(points[block], self._shifts)  # [points, rows + 1]
            terms += self._log_weights - self._shifts**2 / 2
            top = terms.max(axis=1)
            np.exp(terms - top[:, None], out=terms)
            total = terms.sum(axis=1)
            losses[block] = top + np.log(total)
            slopes[block] = terms @ self._shifts / total
        return losses, slopes

    def _inverse(self, losses: np.ndarray) -> np.ndarray:
        """Points at which ln P/Q, which rises and is convex, has the given values.

        A point beside the right one gives a delta that is too small by the square of its distance.
        """
        starts, known = self._starts
        points = np.interp(losses, known, starts)
        for _ in range(NEWTON_STEPS):
            reached, slopes = self._losses(points)
            steps = (losses - reached) / np.maximum(slopes, 1e-300)
            points = np.clip(points + steps, self._lowest, self._highest)
        # The loss is never below ln p_0.
        return np.where(losses <= self._log_weights[0], -np.inf, points)
