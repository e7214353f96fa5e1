"""Lower bounds on epsilon from the scores of canaries that were in or out of a training set.

Independent of `utils.privacy.accounting` on purpose: its claims are what these bounds are held
against.
Every bound holds with the stated confidence for a fixed mechanism; the best of several does so
for all of them together only after a correction for their number.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, special, stats


def gdp_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a mu-GDP mechanism (Dong, Roth and Su 2022, corollary 1).

    Solves delta(eps) = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2), in logarithms, so that
    any mu has a finite answer.
    """

    def excess(epsilon: float) -> float:
        above = special.log_ndtr(-epsilon / mu + mu / 2)
        below = special.log_ndtr(-epsilon / mu - mu / 2)
        return math.exp(above) * -math.expm1(min(0.0, epsilon + below - above)) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    # Without its second term delta(eps) is larger, so its root lies above; by more than rounding.
    top = (mu * mu / 2 - mu * special.ndtri(delta)) * (1 + 1e-6)
    return optimize.brentq(excess, 0.0, top, xtol=1e-9)


def gaussian_pair(
    inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float
) -> float:
    """Lower bound where both groups of scores are Gaussian with one variance.

    mu is the difference of means over the pooled deviation; its error follows from the delta
    method: 1/n_in + 1/n_out + mu² / 2 (n_in + n_out).

    Args:
        inside, outside: float [n], scores of the canaries that took part and of those that did not.
        delta: at which epsilon is meant.
        confidence: one-sided, such as 0.999.
    """
    m = len(inside) + len(outside)
    squares = ((inside - inside.mean()) ** 2).sum() + ((outside - outside.mean()) ** 2).sum()
    mu = (inside.mean() - outside.mean()) / math.sqrt(squares / (m - 2))
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + mu * mu / (2 * m))
    return gdp_epsilon(mu - special.ndtri(confidence) * error, delta)


def gdp(
    inside: np.ndarray,
    outside: np.ndarray,
    thresholds: np.ndarray,
    delta: float,
    confidence: float,
) -> float:
    """Lower bound for a mechanism that is mu-GDP for some mu (Nasr et al. 2023, section 4).

    The best of several thresholds, with Clopper-Pearson bounds on both error rates of each, at a
    level that holds for all of them together.

    Args:
        thresholds: float [k], chosen without a look at the scores; above one is guessed inside.
    """
    alpha = (1 - confidence) / (2 * len(thresholds))
    false_positives = (outside[:, None] > thresholds).sum(axis=0)
    false_negatives = (inside[:, None] <= thresholds).sum(axis=0)
    rates = [
        np.where(errors < count, stats.beta.ppf(1 - alpha, errors + 1, count - errors), 1.0)
        for errors, count in ((false_positives, len(outside)), (false_negatives, len(inside)))
    ]
    mus = -special.ndtri(rates[0]) - special.ndtri(rates[1])
    return gdp_epsilon(float(mus.max()), delta)


def correct_guesses(inside: np.ndarray, outside: np.ndarray, as_in: int, as_out: int) -> int:
    """How many guesses are right that call the highest scores in and the lowest out.

    The guesser sees the scores alone.

    Args:
        inside, outside: see `gaussian_pair`.
        as_in, as_out: how many are called so.
    """
    scores = np.concatenate([inside, outside])
    is_inside = np.arange(len(scores)) < len(inside)
    order = np.argsort(scores)
    highest, lowest = order[len(order) - as_in :], order[:as_out]
    return int(is_inside[highest].sum() + (~is_inside[lowest]).sum())


def one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """Lower bound from one run (Steinke, Nasr and Jagielski 2023, theorem 5.2).

    Of `canaries` that were in with probability 1/2 each, `guesses` were guessed. If the mechanism
    is (eps, delta)-DP, at least v right ones have probability at most
    beta + 2 m delta max_i (P(Bin >= v - i) - beta) / i, with beta = P(Bin >= v) and
    Bin ~ Binomial(guesses, e^eps / (1 + e^eps)). It makes no assumption beyond that, and gives 0
    when delta is large against (1 - confidence) / (2 m).
    """

    def p_value(epsilon: float) -> float:
        tail = stats.binom(guesses, special.expit(epsilon)).sf
        beta = tail(correct - 1)
        i = np.arange(1, correct + 1)
        return beta + 2 * canaries * delta * ((tail(correct - i - 1) - beta) / i).max(initial=0.0)

    return _largest_rejected(p_value, confidence, 50.0)


def one_run_f_dp(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float
) -> float:
    """Lower bound from one run for a mechanism that is mu-GDP (Mahloujifar et al. 2024).

    Let p_i be the probability of exactly i right guesses, R_i = sum_{j >= i} p_j j/m and
    H_i = sum_{j >= i} p_j (guesses - j)/m. Flipping one canary turns "right, i right in all" into
    "wrong, i - 1 right in all", so a trade-off function f bounds R_{i+1} by 1 - f(H_i), for every
    i. Given P(at least `correct` right) = alpha, the least total R_0 + H_0 that these allow has
    all of alpha at `correct` and then, downwards, as little as each bound asks for: moving
    probability one count down loosens every bound below. A mu whose least total exceeds
    guesses/m, the total of all probabilities, is refuted at confidence 1 - alpha.
    """
    alpha = 1 - confidence

    def refuted(mu: float) -> bool:
        right, wrong = alpha * correct / canaries, alpha * (guesses - correct) / canaries
        for i in range(correct - 1, -1, -1):
            # 1 - f(x) = Phi(mu + Phi^-1(x)) of the Gaussian trade-off, inverted.
            needed = special.ndtr(special.ndtri(right) - mu)
            if needed > wrong:
                right += (needed - wrong) * i / (guesses - i)
                wrong = needed
            if right + wrong > guesses / canaries:
                return True
        return False

    mu = _largest_rejected(lambda mu: 0.0 if refuted(mu) else 1.0, confidence, 20.0)
    return gdp_epsilon(mu, delta)


def _largest_rejected(
    p_value: Callable[[float], float], confidence: float, top: float, steps: int = 40
) -> float:
    """The largest value whose p-value, which grows with it, is below 1 - confidence; else 0."""
    low, high = 0.0, top
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) < 1 - confidence else (low, middle)
    return low
