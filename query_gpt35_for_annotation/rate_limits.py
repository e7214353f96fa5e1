"""Request and token budgets per minute, from the user, from the server, and from its refusals."""

import asyncio
import math
import random
import time
from collections.abc import Mapping

# A bucket holds two seconds' worth (one unit at least) and refills a little slower than its limit,
# so that no minute holds more than the limit: 0.96 + 2/60 < 1.
_BURST_SECONDS = 2
_HEADROOM = 0.96
# The pace is judged once a window: with more than this share of refusals it falls to what the
# server accepted, otherwise it grows.
_WINDOW_SECONDS = 2
_OVERLOAD_SHARE = 0.25
_GROWTH = 1.25
# So many refusals without one acceptance between them do not come by chance: every request waits.
_STORM = 5
# Refusals cost nothing, and a longer pause would outlast most storms by much.
LONGEST_REFUSAL_PAUSE = 10


def backoff(attempt: int, longest: float = 60) -> float:
    """Seconds before retry number `attempt`: 0.5, doubled up to `longest`, with jitter."""
    return min(longest, 0.5 * 2 ** min(attempt - 1, 10)) * random.uniform(0.75, 1.25)


class Bucket:
    """A token bucket that starts full; without a limit it stays so."""

    def __init__(self, per_minute: float = math.inf):
        self._level, self._taken, self._time = math.inf, 1.0, time.monotonic()
        self.set_limit(per_minute)

    def set_limit(self, per_minute: float) -> None:
        """Change the limit; what was saved up stays as far as it fits."""
        self.per_minute = per_minute
        self._capacity = max(1.0, per_minute / 60 * _BURST_SECONDS)
        full = math.isinf(self._capacity)
        self._level = math.inf if full else min(self._level, self._capacity)

    def seconds_until(self, amount: float) -> float:
        """How long until `amount` is there; more than fits in counts as a full bucket."""
        if math.isinf(self.per_minute):
            return 0.0
        rate = self.per_minute / 60 * _HEADROOM
        now = time.monotonic()
        self._level = min(self._capacity, self._level + rate * (now - self._time))
        self._time = now
        return max(0.0, (min(amount, self._capacity) - self._level) / rate)

    def take(self, amount: float) -> None:
        """Use `amount`, into debt if need be."""
        self._level -= amount
        self._taken = amount

    def correct(self, amount: float) -> None:
        """Use `amount` more than was taken, or give back where it is negative."""
        self._level = min(self._capacity, self._level - amount)

    def lower_to(self, remaining: float) -> None:
        """Believe a server that has less left than this bucket.

        One request's worth stays: a busy server reports 0 with every answer, and to empty the
        bucket each time would starve a client that keeps to the limit.
        """
        self._level = min(self._level, max(remaining, self._taken))


class RateBudget:
    """Admits requests, first come first served, as fast as every limit allows.

    The limits are the user's, the server's (`x-ratelimit-*` headers), and a pace that is found
    from 429 answers where no limit is known or the known one is wrong. A `Retry-After` holds back
    its own request, and after several refusals in a row all of them.

    Args:
        requests_per_minute, tokens_per_minute: the user's limits, None for none.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None):
        self._given = {
            "requests": requests_per_minute or math.inf,
            "tokens": tokens_per_minute or math.inf,
        }
        self._buckets = {name: Bucket(limit) for name, limit in self._given.items()}
        self._pace = Bucket()
        self._turn = asyncio.Lock()
        self._blocked_until = -math.inf
        self._refused_in_a_row = 0
        self._start_window(time.monotonic())

    async def admit(self, tokens: float) -> None:
        """Wait for the turn of a request of about `tokens` tokens."""
        requests_bucket, tokens_bucket = self._buckets["requests"], self._buckets["tokens"]
        async with self._turn:
            while wait := max(
                self._blocked_until - time.monotonic(),
                requests_bucket.seconds_until(1),
                tokens_bucket.seconds_until(tokens),
                self._pace.seconds_until(1),
                0,
            ):
                # In slices, since a limit may change; none so short that no clock sees it.
                await asyncio.sleep(min(max(wait, 0.001), 0.5))
            requests_bucket.take(1)
            tokens_bucket.take(tokens)
            self._pace.take(1)

    def used(self, tokens_more: float) -> None:
        """An answer took `tokens_more` tokens more than it was admitted with (less: negative)."""
        self._buckets["tokens"].correct(tokens_more)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Follow the limits that the server states with an answer."""
        for name, bucket in self._buckets.items():
            limit = _number(headers.get(f"x-ratelimit-limit-{name}"))
            if limit:
                bucket.set_limit(min(limit, self._given[name]))
            remaining = _number(headers.get(f"x-ratelimit-remaining-{name}"))
            if remaining is not None:
                bucket.lower_to(remaining)

    def accepted(self) -> None:
        """The server did not refuse a request for its rate."""
        self._refused_in_a_row = 0
        self._count(accepted=1)

    def refused(self, sent_at: float, retry_after: float | None) -> None:
        """The server answered 429 to a request that was sent at `sent_at`."""
        now = time.monotonic()
        if sent_at < self._blocked_until:  # one of the storm that is being waited out
            self._blocked_until = max(self._blocked_until, now + (retry_after or 0))
            return
        self._refused_in_a_row += 1
        self._count(refused=1)
        if self._refused_in_a_row % _STORM == 0:
            storms = self._refused_in_a_row // _STORM
            pause = retry_after or backoff(storms, LONGEST_REFUSAL_PAUSE)
            self._blocked_until = now + pause
            self._judge(now)
            self._start_window(self._blocked_until)

    def _start_window(self, now: float) -> None:
        self._window_start, self._accepted, self._refused = now, 0, 0

    def _count(self, accepted: int = 0, refused: int = 0) -> None:
        self._accepted += accepted
        self._refused += refused
        now = time.monotonic()
        if now - self._window_start >= _WINDOW_SECONDS:
            self._judge(now)
            self._start_window(now)

    def _judge(self, now: float) -> None:
        """Set the pace by what the server accepted and refused in this window."""
        pace = self._pace.per_minute
        if self._refused > _OVERLOAD_SHARE * (self._accepted + self._refused):
            seconds = max(now - self._window_start, _WINDOW_SECONDS)
            accepted = self._accepted / seconds * 60 or math.inf
            # At most by half: one bad moment should not take minutes to recover from.
            self._pace.set_limit(min(pace, max(accepted, 0 if math.isinf(pace) else pace / 2)))
        elif pace * _GROWTH < self._buckets["requests"].per_minute:
            self._pace.set_limit(pace * _GROWTH)
        else:
            self._pace.set_limit(math.inf)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
