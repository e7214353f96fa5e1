"""How likely texts are under a model of short runs of tokens, fitted on other texts.

Interpolated by Witten and Bell's rule ("The zero-frequency problem", 1991): a context that was
followed by many different tokens leaves more to shorter ones.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

ORDER = 5


class NGrams:
    """Counts of runs of up to `ORDER` tokens.

    Args:
        texts: token ids of each text that it is fitted on.
        vocabulary: number of tokens, among which an unseen one is drawn evenly.
    """

    def __init__(self, texts: Iterable[Sequence[int]], vocabulary: int):
        self._vocabulary = vocabulary
        self._runs: Counter[tuple[int, ...]] = Counter()
        # How often a context was followed by something, and by how many different tokens.
        self._followed: Counter[tuple[int, ...]] = Counter()
        self._kinds: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            tokens = tuple(text)
            for end in range(1, len(tokens) + 1):
                for start in range(max(0, end - ORDER), end):
                    run = tokens[start:end]
                    self._kinds[run[:-1]] += run not in self._runs
                    self._runs[run] += 1
                    self._followed[run[:-1]] += 1

    def gain(self, tokens: Sequence[int], first: int = 0) -> float:
        """How much likelier the tokens from `first` on are than each by itself, nats a token.

        Against the model's own counts of single tokens, so that rare ones by themselves say
        nothing; 0 where there are none.
        """
        ids = tuple(tokens)
        gains = [
            math.log(self._probability(ids[max(0, end - ORDER + 1) : end], ids[end]))
            - math.log(self._probability((), ids[end]))
            for end in range(first, len(ids))
        ]
        return sum(gains) / max(1, len(gains))

    def _probability(self, context: tuple[int, ...], token: int) -> float:
        shorter = self._probability(context[1:], token) if context else 1 / self._vocabulary
        kinds = self._kinds[context]
        if not kinds:
            return shorter
        count = self._runs[(*context, token)] + kinds * shorter
        return count / (self._followed[context] + kinds)
