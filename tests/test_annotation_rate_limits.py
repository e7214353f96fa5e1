"""Rate budgets on a clock that the tests turn."""

import asyncio
import random
import time
from bisect import bisect_left
from collections import Counter

import pytest

from query_gpt35_for_annotation.rate_limits import Bucket, RateBudget


class Clock:
    """Time that passes only where the budget sleeps."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr("query_gpt35_for_annotation.rate_limits.asyncio.sleep", self.sleep)

    async def sleep(self, seconds):
        self.now += seconds


def admitted(budget, clock, count, tokens=1.0):
    async def run():
        times = []
        for _ in range(count):
            await budget.admit(tokens)
            times.append(clock.now)
        return times

    return asyncio.run(run())


@pytest.mark.parametrize("per_minute", [3, 20, 60, 61, 500, 3000])
def test_no_minute_holds_more_than_the_limit_and_little_less(per_minute, monkeypatch):
    clock = Clock(monkeypatch)
    times = admitted(RateBudget(per_minute, None), clock, per_minute * 4)
    most = max(bisect_left(times, start + 60) - number for number, start in enumerate(times))
    assert most <= per_minute
    assert times[-1] - times[0] < 4 * 60 / 0.95


def test_tokens_are_limited_by_what_answers_really_take(monkeypatch):
    clock = Clock(monkeypatch)
    budget = RateBudget(None, 6000)
    asyncio.run(budget.admit(1000))  # more than the bucket holds: debt, not a deadlock
    budget.used(-900)
    start = clock.now
    admitted(budget, clock, 60, tokens=100)
    assert 55 <= clock.now - start <= 64


def test_the_servers_limits_are_followed(monkeypatch):
    clock = Clock(monkeypatch)
    budget = RateBudget(6000, None)
    budget.learn({"x-ratelimit-limit-requests": "60", "x-ratelimit-limit-tokens": "nonsense"})
    times = admitted(budget, clock, 60)
    assert 57 <= times[-1] - times[0] <= 63
    budget.learn({"x-ratelimit-limit-requests": "999999"})
    times = admitted(budget, clock, 600)  # the user's limit holds
    assert 5.5 <= times[-1] - times[0] <= 6.5


def test_a_server_with_nothing_left_slows_but_does_not_starve(monkeypatch):
    clock = Clock(monkeypatch)
    budget = RateBudget(600, None)
    start = clock.now
    for _ in range(100):
        admitted(budget, clock, 1)
        budget.learn({"x-ratelimit-remaining-requests": "0"})
    assert 9.5 <= clock.now - start <= 11  # no burst of 20, but the rate


def test_a_bucket_that_was_without_limit_owes_nothing_later():
    bucket = Bucket()
    for _ in range(1000):
        bucket.take(1)
    bucket.set_limit(60)
    assert bucket.seconds_until(1) == 0
    bucket.set_limit(float("inf"))
    bucket.take(1000)
    bucket.set_limit(60)
    assert bucket.seconds_until(1) == 0


def bucket(per_second, outage=()):
    """A server that takes so many a second, one second's worth at once, and tells nobody."""
    level, seen = per_second, 0.0

    def refusal(now):
        nonlocal level, seen
        level, seen = min(per_second, level + per_second * (now - seen)), now
        if level < 1 or int(now) in outage:
            return None, True
        level -= 1
        return None, False

    return refusal


def window(per_minute):
    """A server that counts by the minute, and says how long to wait."""
    counts = Counter()

    def refusal(now):
        counts[now // 60] += 1
        return 60 - now % 60, counts[now // 60] > per_minute

    return refusal


@pytest.mark.parametrize(
    ("refusal", "most"),
    [
        (bucket(10), 3000),
        (bucket(200), 60_000),
        (window(600), 3000),
        (bucket(10, outage=range(60, 90)), 2700),
    ],
)
def test_an_unknown_limit_is_found_and_used(refusal, most, monkeypatch):
    """Five minutes of a client that could send 500 a second."""
    random.seed(0)
    clock = Clock(monkeypatch)
    budget, accepted, refused, begin = RateBudget(None, None), 0, 0, clock.now

    async def run():
        nonlocal accepted, refused
        while clock.now - begin < 300:
            await budget.admit(1)
            clock.now += 0.002
            retry_after, refuses = refusal(clock.now - begin)
            if refuses:
                refused += 1
                budget.refused(clock.now, retry_after)
            else:
                accepted += 1
                budget.accepted()

    asyncio.run(run())
    assert accepted > 0.85 * most
    assert refused < 0.25 * (accepted + refused)


def test_a_storm_holds_back_every_request(monkeypatch):
    clock = Clock(monkeypatch)
    budget = RateBudget(None, None)
    for _ in range(4):
        budget.refused(clock.now, 30)
    assert admitted(budget, clock, 1)[0] == 1000  # a few refusals hold back their own requests
    budget.refused(clock.now, 30)
    assert admitted(budget, clock, 1)[0] == 1030
