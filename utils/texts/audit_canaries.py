"""Canaries of an audit: made-up rows of which a secret coin says whether each is trained on.

Who is shown the model and all canaries, and guesses the coins better than a guarantee allows, has
refuted it (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run"). So the
coins are the secret: they stay under a run's `private/`, and what the canaries say follows from the
seed alone. N counts every canary, in or out. One that is out keeps its place in N and is drawn like
any other, as a row without a token that carries loss: its gradient is zero, as though it were not
there, and neither sampling rate nor accounting knows a coin. No torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import UsageError
from utils.files import json_object
from utils.texts.prompts import INSTRUCTION_STYLES, columns_of
from utils.texts.tokens import TokenisedExamples, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, NATURAL = "tokens", "natural"
KINDS = (TOKENS, NATURAL)
# Under a run's private/: which canaries are in.
COINS_FILE = "audit_canaries.json"
# Tokens of a canary of random ones: few, so that clipping leaves each of them a large share.
LENGTH = 8
# How natural canaries begin, as users do; they end in made-up words of three syllables.
OPENINGS = (
    "Write a short story about", "What is the difference between", "Can you explain to me",
    "Give me a list of ideas for", "How do I find out more about", "Please summarise the text on",
    "Tell me everything you know about", "I need help with a letter about",
)  # fmt: skip
WORDS, SYLLABLES = 4, 3
SYLLABLE = ("bdfgklmnprstvz", "aeiou")


@dataclass(frozen=True)
class AuditCanaries:
    """The canaries of a run, in and out.

    Attributes:
        count: m of them.
        kind: TOKENS, random ids of the vocabulary, which no row has in this order; or NATURAL, an
            opening as users write it and an ending that nobody expects.
        seed: what they say follows from it.
    """

    count: int
    kind: str
    seed: int

    def inside(self, coins: dict) -> np.ndarray:
        """bool [canaries], which are in.

        Args:
            coins: of `COINS_FILE`.
        """
        inside = np.zeros(self.count, dtype=bool)
        inside[coins["inside"]] = True
        return inside

    def opening(self, number: int) -> str:
        """How natural canary `number` begins."""
        return OPENINGS[self._numbers(number, 1)[0] % len(OPENINGS)]

    def ending(self, number: int) -> str:
        """How it ends: made-up words."""
        letters = iter(self._numbers(number, 1 + 2 * WORDS * SYLLABLES)[1:])
        words = [
            "".join(kind[next(letters) % len(kind)] for _ in range(SYLLABLES) for kind in SYLLABLE)
            for _ in range(WORDS)
        ]
        return " ".join(words)

    def examples(
        self, tokenizer: "PreTrainedTokenizerBase", style: str, max_seq_len: int
    ) -> TokenisedExamples:
        """All canaries as rows to train on, each as though it were in.

        Args:
            style: the run's prompt style, which natural canaries take.

        Raises:
            UsageError: `max_seq_len` cuts one off.
        """
        if self.kind == TOKENS:
            special = set(tokenizer.all_special_ids)
            ordinary = np.array([i for i in range(len(tokenizer)) if i not in special])
            ids = np.full((self.count, LENGTH + 1), tokenizer.eos_token_id, dtype=np.int32)
            for number, row in enumerate(ids):
                row[:-1] = ordinary[self._numbers(number, LENGTH) % len(ordinary)]
            offsets = np.arange(self.count + 1) * ids.shape[1]
            made = TokenisedExamples(ids.ravel(), offsets, np.zeros(self.count, dtype=np.int32))
        else:
            ends = [(self.opening(number), self.ending(number)) for number in range(self.count)]
            # The opening is what pairs ask, and the topic of an instruction that begins with it.
            *asked, written = columns_of(style)
            rows = [
                dict.fromkeys(asked, both[0])
                | {written: " ".join(both) if style in INSTRUCTION_STYLES else both[1]}
                for both in ends
            ]
            made = tokenised(rows, tokenizer, style, max_seq_len + 1)
        if made.lengths.max() > max_seq_len:
            raise UsageError(
                f"--max_seq_len {max_seq_len} cuts the audit's canaries off; give a larger one, or "
                "leave --audit_canaries out"
            )
        return made

    def _numbers(self, number: int, count: int) -> np.ndarray:
        """Numbers below 2^32 that make canary `number`, int64 [count].

        SHAKE, since no release of a library of random numbers may change what a run was trained on.
        """
        name = f"audit canary {number} of seed {self.seed}"
        digest = hashlib.shake_256(name.encode()).digest(4 * count)
        return np.frombuffer(digest, dtype="<u4").astype(np.int64)


def read_coins(run: Path, count: int) -> dict:
    """What a run's `COINS_FILE` holds of so many canaries.

    Raises:
        UsageError: it is not there, or was damaged.
    """
    file = run / "private" / COINS_FILE
    coins = json_object(file)
    inside = coins.get("inside")
    known = range(count)
    if not (isinstance(inside, list) and all(type(i) is int and i in known for i in inside)):
        raise UsageError(
            f"{file} is not there or damaged: restore it from a backup, since it alone knows which "
            "canaries are in, or train anew with another --job_sess"
        )
    return coins


def coins_fingerprint(coins: dict) -> str:
    """By which the coins of a run are known again.

    Args:
        coins: of `COINS_FILE`.
    """
    return hashlib.sha256(json.dumps(sorted(coins["inside"])).encode()).hexdigest()


def as_trained(canaries: TokenisedExamples, inside: np.ndarray, eos_id: int) -> TokenisedExamples:
    """Canaries as a run sees them: one that is out is a single token without loss.

    Args:
        inside: bool [canaries], the coins.
    """
    kept = np.repeat(inside, canaries.lengths)
    first = np.zeros(len(canaries.ids), dtype=bool)
    first[canaries.offsets[:-1]] = True
    ids = np.where(kept, canaries.ids, eos_id)[kept | first].astype(np.int32)
    lengths = np.where(inside, canaries.lengths, 1)
    starts = np.where(inside, canaries.loss_starts, 1).astype(np.int32)
    return TokenisedExamples(ids, np.concatenate([[0], np.cumsum(lengths)]), starts)
