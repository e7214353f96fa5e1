"""What answers cost: prices, token estimates, and a bound that is never passed."""

import asyncio
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from query_gpt35_for_annotation.job import Job, number_within
from utils.cli import UsageError
from utils.command_line.parser import flag

PRICES_FILE = Path(__file__).with_name("prices.json")
BATCH_DISCOUNT = 0.5
# Chat markup around one user message: about 8 tokens at the vendor; some local templates add a
# system prompt of their own, and this leaves room for it.
_MARKUP_TOKENS, _MOST_MARKUP_TOKENS = 8, 256


def _price(side: str) -> Any:
    return flag(
        f"US dollars per million {side} tokens; give both, or none to take the dated list in "
        f"{PRICES_FILE.name}",
        type=number_within(0, math.inf),
        metavar="USD",
    )


@dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """The flags of a price."""

    input_price: float | None = _price("input")
    output_price: float | None = _price("output")


class BudgetReached(Exception):
    """Another request might pass `--max_cost`."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """The cost of so many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def price_of(
    model: str, input_price: float | None = None, output_price: float | None = None
) -> tuple[Price | None, str]:
    """The price of `model`, None where nobody knows it, and a line that says where it is from.

    Args:
        input_price, output_price: as the user gave them; that of the dated list where both are
            None.

    Raises:
        UsageError: one price without the other.
    """
    if input_price is not None and output_price is not None:
        price, source = Price(input_price, output_price), "as given by the flags"
    elif input_price is not None or output_price is not None:
        raise UsageError("--input_price and --output_price go together; give both or none")
    else:
        prices = json.loads(PRICES_FILE.read_text(encoding="utf-8"))
        if model not in prices["models"]:
            return None, (
                f"no price is known for model {model!r}; give --input_price and "
                "--output_price in US dollars per million tokens"
            )
        price = Price(**prices["models"][model])
        source = f"list price as of {prices['as_of']}, check it"
    return price, f"price: ${price.input:g} in, ${price.output:g} out a million tokens ({source})"


def estimated_prompt_tokens(instruction: str) -> int:
    """A fair guess without the vendor's tokenizer: 4 ASCII characters or 2 other bytes a token."""
    size = len(instruction.encode())
    ascii_size = sum(character < "\x80" for character in instruction)
    return math.ceil(ascii_size / 4 + (size - ascii_size) / 2) + _MARKUP_TOKENS


def most_prompt_tokens(instruction: str) -> int:
    """An upper bound: byte-level tokenizers never make more tokens than UTF-8 bytes."""
    return len(instruction.encode()) + _MOST_MARKUP_TOKENS


class Spending:
    """The money that a job has spent, and the most that its requests in flight may still cost.

    An attempt whose answer never arrived (a timeout, a connection cut) may have been billed: it
    counts at its worst case.
    """

    def __init__(self, job: Job, price: Price | None, limit: float | None, records: list[dict]):
        self._max_answer_tokens = job.max_answer_tokens
        self._price = price
        self._limit = math.inf if limit is None else limit
        self.spent = sum(self._of_record(record) for record in records)
        self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()

    def worst_case(self, instruction: str) -> float:
        """US dollars that one request for `instruction` costs at most."""
        return self._usd(most_prompt_tokens(instruction), self._max_answer_tokens or 0)

    async def reserve(self, usd: float) -> None:
        """Wait until a request of at most `usd` fits below the limit together with those in flight.

        Raises:
            BudgetReached: it does not fit, and none is in flight that might leave room.
        """
        async with self._changed:
            while self.spent + self._reserved + usd > self._limit:
                if not self._in_flight:
                    raise BudgetReached
                await self._changed.wait()
            self._reserved += usd
            self._in_flight += 1

    async def settle(self, reserved: float, usage: dict | None, paid: bool) -> None:
        """Replace a reservation by the real cost: of `usage`, of the worst case, or nothing."""
        async with self._changed:
            self._reserved -= reserved
            self._in_flight -= 1
            if usage:
                self.spent += self._usd(usage["prompt_tokens"], usage["completion_tokens"])
            elif paid:
                self.spent += reserved
            self._changed.notify_all()

    def summary(self) -> str:
        """The cost so far, for the progress bar."""
        return "price unknown" if self._price is None else f"${self.spent:.4f}"

    def _usd(self, input_tokens: float, output_tokens: float) -> float:
        return self._price.usd(input_tokens, output_tokens) if self._price else 0.0

    def _of_record(self, record: dict) -> float:
        usage = record["usage"] or {"prompt_tokens": 0, "completion_tokens": 0}
        factor = BATCH_DISCOUNT if record.get("batch") else 1
        answered = self._usd(usage["prompt_tokens"], usage["completion_tokens"])
        return factor * answered + record["unmetered_attempts"] * self.worst_case(
            record["instruction"]
        )


def estimate(
    instructions: Iterable[str], job: Job, price: Price | None, answer_tokens: list[int]
) -> list[str]:
    """Lines that say what asking `instructions` will take.

    Args:
        answer_tokens: lengths of the answers that the job already has.
    """
    count = prompt = 0
    for instruction in instructions:
        count += 1
        prompt += estimated_prompt_tokens(instruction)
    lines = [f"{count:,} instructions to ask, about {prompt:,} prompt tokens"]

    def with_cost(text: str, tokens: float) -> str:
        cost = f", ${price.usd(prompt, tokens):,.2f}" if price else ""
        batch = (
            f" (${BATCH_DISCOUNT * price.usd(prompt, tokens):,.2f} in batch mode)" if price else ""
        )
        return f"{text}: {tokens:,.0f} answer tokens{cost}{batch}"

    if job.max_answer_tokens:
        most = job.max_answer_tokens * count
        lines.append(with_cost(f"at most, if each answer takes {job.max_answer_tokens:,}", most))
    else:
        lines.append("answers have no bound, since --drop_parameters names max_tokens")
    if answer_tokens:
        mean = sum(answer_tokens) / len(answer_tokens)
        text = f"likely, at the mean of {mean:,.0f} of the {len(answer_tokens):,} answers so far"
        lines.append(with_cost(text, mean * count))
    else:
        lines.append("for a likely figure, run once with --limit 100 and then this again")
    return lines
