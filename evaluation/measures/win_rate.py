"""Win rates from pairwise judgements, as they are and with the length of answers controlled for.

A judgement says how much the answer that stood first is preferred: 1, 0.5 for a tie, 0.
"""

import re

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

VERDICTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
# As a normal prior of deviation 10 logits on each coefficient: it is not felt unless the data
# would send a coefficient to infinity.
RIDGE = 0.01


# A word of a line, without the marks that it stands in.
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_INTRODUCTION = re.compile(
    r"(?i)^(?:(?:my|the|final|verdict|answer|response|winner|is)(?: |$))+(?=(?:a|b|tie)$)"
)
# Sentences that name the better answer after the word that says so, or before it.
_BETTER = "better|best|winner|preferred|preferable|superior|stronger"
_NAMED_AFTER = re.compile(
    rf"\b(?:{_BETTER}|prefer|choose|pick|verdict)(?: one)?(?: answer| response)?"
    r"(?: is| would be)?(?: answer| response)? ([AB])\b"
)
_NAMED_BEFORE = re.compile(
    rf"\b([AB]) (?:wins\b|(?:is|was|does|serves)\b(?:(?! [AB]\b).)*? (?:{_BETTER})\b)"
)
_TIED = re.compile(r"(?i)\b(?:a tie|tied)\b")
_DENIED = re.compile(r"(?i)\b(?:no|not|neither|nor|worse|\w+n['’]t)\b")


def read_verdict(reply: str) -> float | None:
    """What a judge's reply says on its last line: A, B or tie.

    It stands there alone, whatever is around it ("**A**", "[[B]]", "Verdict: tie"), or in a
    sentence that prefers one of the two and nothing else; None for anything else.
    """
    words = " ".join(_WORD.findall(reply.strip().rpartition("\n")[2]))
    alone = _INTRODUCTION.sub("", words).casefold()
    if alone in VERDICTS:
        return VERDICTS[alone]
    named = {*_NAMED_AFTER.findall(words), *_NAMED_BEFORE.findall(words)}
    named |= {"tie"} if _TIED.search(words) else set()
    if _DENIED.search(words) or len(named) != 1:
        return None
    return VERDICTS[named.pop().casefold()]


def preferences(ours_first: np.ndarray, theirs_first: np.ndarray) -> np.ndarray:
    """How much each pair prefers ours: 1 or 0 where both orders say so, else 0.5.

    Args:
        ours_first, theirs_first: float64 [pairs], judgements with ours and with theirs first.
    """
    return np.where(ours_first == 1 - theirs_first, ours_first, 0.5)


def contradictions(ours_first: np.ndarray, theirs_first: np.ndarray) -> np.ndarray:
    """1 for each pair whose orders prefer the same position, so not the same answer; else 0."""
    return (np.abs(ours_first + theirs_first - 1) == 1).astype(float)


def length_feature(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """tanh of the difference in length over its standard deviation (Dubois et al. 2024).

    Args:
        ours, theirs: [pairs], the lengths of both answers in any unit.

    Returns:
        float64 [pairs], 0 where lengths are equal; None unless ours is longer in some pairs and
        shorter in others, since equal lengths would then lie outside of what was judged.
    """
    difference = ours - theirs
    if not difference.min() < 0 < difference.max():
        return None
    return np.tanh(difference / difference.std())


def length_controlled(feature: np.ndarray, preference: np.ndarray) -> float:
    """The win rate that answers of equal length would have.

    A logistic regression of the preference on a constant and the length feature, evaluated where
    that is 0 (Dubois et al. 2024, "Length-Controlled AlpacaEval"). The paper's third term, the
    difficulty of an instruction, has to be learnt from many systems and is left out. `RIDGE` keeps
    the answer finite where the data is separable.

    Args:
        feature, preference: float64 [pairs]; preferences from 0 to 1.
    """
    return float(expit(_fit(feature, preference)[0]))


def _fit(feature: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """The coefficients of the constant and of the feature."""
    design = np.stack([np.ones_like(feature), feature])  # [2, pairs]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights @ design
        value = np.logaddexp(0, logits).sum() - preference @ logits
        gradient = design @ (expit(logits) - preference)
        return value + RIDGE / 2 * weights @ weights, gradient + RIDGE * weights

    def curvature(weights: np.ndarray) -> np.ndarray:
        chance = expit(weights @ design)
        return (design * chance * (1 - chance)) @ design.T + RIDGE * np.eye(2)

    options = {"gtol": 1e-6}  # a separable set has so little curvature
    begin = np.zeros(2)
    return minimize(loss, begin, jac=True, hess=curvature, method="trust-exact", options=options).x
