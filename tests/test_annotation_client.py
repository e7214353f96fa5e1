"""The client against a server that misbehaves in every way that servers have been seen to."""

import asyncio
import gzip
import json
import re
import time
from pathlib import Path

import httpx2
import pytest

from query_gpt35_for_annotation.client import (
    Client,
    StopRun,
    _Careful,
    read_completion,
    retry_after_seconds,
)
from query_gpt35_for_annotation.job import Job
from query_gpt35_for_annotation.rate_limits import RateBudget
from query_gpt35_for_annotation.spending import BudgetReached, Price, Spending
from tests.annotation_server import KEY, Reply, Server, answer, completion, error
from utils.cli import UsageError

pytestmark = pytest.mark.usefixtures("key")


def job_for(url, **decoding):
    return Job(Path("unused"), "m", url, decoding or {"temperature": 0.7, "max_tokens": 50}, [])


def ask(server, *instructions, spending=None, proven=False, kept=None, **settings):
    """Ask one after the other; returns the records and why the client stopped."""
    settings = {"timeout": 2.0, "max_retries": 3, "patience": 60.0} | settings
    job = job_for(server.url)

    async def keep(record):
        (kept if kept is not None else []).append(record)

    async def run():
        money = spending or Spending(job, None, None, [])
        client = Client(job, RateBudget(None, None), money, keep, proven=proven, **settings)
        try:
            records = [await client.ask(instruction) for instruction in instructions]
        finally:
            await client.close()
        return records, client.stop_reason

    return asyncio.run(run())


def first_faulty(*faults):
    """Faults for the first attempts of an instruction, then an answer."""
    return lambda request: faults[request.asked] if request.asked < len(faults) else answer(request)


PASSING = {
    "500": lambda: error(500, "oops"),
    "503 with Retry-After": lambda: error(503, "busy", {"retry-after": "0.1"}),
    "529": lambda: error(529, "overloaded"),
    "gateway 504": lambda: Reply(b"<html>", 504),
    "408": lambda: error(408, "slow"),
    "409": lambda: error(409, "lock"),
    "429": lambda: error(429, "slow down", code="rate_limit_exceeded"),
    "429 with Retry-After": lambda: error(429, "slow down", {"retry-after": "0.1"}),
    "429 with a body that is no JSON": lambda: Reply(b"<html>", 429),
    "hang": lambda: Reply(completion("x"), wait=5),
    "slow drip": lambda: Reply(completion("x"), drip=0.02),
    "cut in the body": lambda: Reply(completion("x"), cut=40),
    "cut before the body": lambda: Reply(completion("x"), cut=0),
    "malformed JSON": lambda: Reply(b'{"choices": [{'),
    "no JSON": lambda: Reply(b"<html>", headers={"content-type": "text/html"}),
    "JSON that is no object": lambda: Reply(b"[1]"),
    "JSON too deep": lambda: Reply(b"[" * 100_000),
    "no Unicode": lambda: Reply(b'{"choices": "\xff\xfe"}'),
    "malformed gzip": lambda: Reply(b"no gzip", headers={"content-encoding": "gzip"}),
    "empty choices": lambda: Reply({"choices": []}),
    "null choices": lambda: Reply({"choices": None, "error": {"message": "upstream"}}),
    "no message": lambda: Reply({"choices": [{"finish_reason": "stop"}]}),
    "empty body": lambda: Reply(b""),
    "body without end": lambda: Reply(b" " * (17 << 20)),
    "gzip without end": lambda: Reply(
        gzip.compress(bytes(40 << 20)), headers={"content-encoding": "gzip"}
    ),
    "no answer but an error in a choice": lambda: Reply(
        {"choices": [{"error": {"code": 502, "message": "upstream"}, "finish_reason": "error"}]}
    ),
    "429 in a choice": lambda: Reply(
        {"choices": [{"error": {"code": 429, "message": "slow"}, "message": {"content": "ha"}}]}
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_are_retried(name, quick):
    with Server(first_faulty(PASSING[name]())) as server:
        (record,), _ = ask(server, "q", timeout=1.0)
    assert (record["status"], record["answer"]) == ("ok", "answer to q")
    assert len(server.requests) == 2
    maybe_paid = (
        "gateway", "hang", "slow", "cut", "mal", "no", "JSON", "empty", "null", "body", "gzip",
    )  # fmt: skip
    unmetered = name.startswith(maybe_paid)
    assert record["unmetered_attempts"] == int(unmetered)


def test_retries_are_bounded_and_the_instruction_is_left_to_ask_again(quick):
    with Server(lambda request: error(500, f"oops {KEY}")) as server:
        (record,), _ = ask(server, "q", max_retries=3)
    assert len(server.requests) == 4
    assert record["status"] == "unanswered"
    assert "500" in record["error"]


def test_a_server_that_is_not_there_is_not_charged_for(quick):
    with Server() as server:
        pass
    (record,), _ = ask(server, "q", max_retries=1)
    assert record["status"] == "unanswered"
    assert record["unmetered_attempts"] == 0
    assert "ConnectError" in record["error"]


STOPPING = {
    "quota": (error(429, "no money", code="insufficient_quota"), "quota is used up"),
    "quota by type": (error(429, "no money", type="insufficient_quota"), "quota is used up"),
    "401": (error(401, f"Incorrect API key provided: {KEY}"), r"OPENAI_API_KEY \(.*\[key\]"),
    "403": (error(403, "country"), "OPENAI_API_KEY .*country"),
    "404": (error(404, "gone", code="model_not_found"), "no model 'm'.*retired.*--model"),
    "404 without JSON": (Reply(b"nothing here", 404), "should end in /v1 .*nothing here"),
    "model in a 400": (error(400, "bad model", code="model_not_found"), "no model 'm'"),
    "temperature": (
        error(400, "Unsupported value", param="temperature", code="unsupported_value"),
        "--drop_parameters temperature",
    ),
    "max_tokens": (
        error(400, "Unsupported parameter: 'max_tokens'", param="max_tokens"),
        "--max_tokens_parameter max_completion_tokens",
    ),
    "402": (error(402, "Insufficient balance"), "quota is used up"),
    "410": (error(410, "gone"), "no model 'm'"),
    "422 without the vendor's form": (
        Reply({"detail": "Unexpected fields in the request: {'temperature'}"}, 422),
        "--drop_parameters temperature",
    ),
}


@pytest.mark.parametrize("name", STOPPING)
def test_hopeless_errors_stop_the_run_at_once(name):
    reply, message = STOPPING[name]
    with Server(lambda request: reply) as server:
        (record, nothing), reason = ask(server, "q", "never sent")
    assert len(server.requests) == 1
    assert re.search(message, reason)
    assert (record["status"], record["unmetered_attempts"]) == ("unanswered", 0)
    assert nothing is None
    assert KEY not in reason + json.dumps(record)


REFUSED = {
    "content filter": (error(400, "filtered", code="content_filter"), True),
    "too long": (error(400, "too long", code="context_length_exceeded", param="messages"), True),
    "too long, vLLM": (
        error(400, "'max_tokens' is too large: 50. This model's maximum context length is 64"),
        True,
    ),
    "too large": (Reply(b"<html>", 413), True),
    "no reason": (error(400, "invalid"), False),
    "an error of an odd form": (error(400, "invalid", code={"a": 1}, type=[1], param=[2]), False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_instruction_is_recorded_and_not_retried(name):
    reply, blames_instruction = REFUSED[name]
    with Server(lambda request: reply) as server:
        (record,), reason = ask(server, "q")
    assert len(server.requests) == 1
    assert (record["status"], record["blames_instruction"]) == ("failed", blames_instruction)
    assert reason is None


def test_a_mention_of_a_parameter_stops_nothing_once_it_has_worked():
    echo = error(400, "cannot discuss the temperature on Mars")
    with Server(lambda request: echo) as server:
        (record,), reason = ask(server, "q", proven=True)
        assert (record["status"], reason) == ("failed", None)
        assert "--drop_parameters temperature" in ask(server, "q", proven=False)[1]


def test_the_key_goes_to_the_server_and_nowhere_else(caplog):
    caplog.set_level("DEBUG")
    with Server(first_faulty(error(500, KEY))) as server:
        records, _ = ask(server, "q")
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(caplog.records) > 3
    assert KEY not in caplog.text + json.dumps(records)


@pytest.mark.parametrize("length", range(980, 1004, 4))
def test_no_part_of_a_key_is_left_where_an_error_is_cut(length):
    with Server(lambda request: Reply(b"x" * length + KEY.encode(), 400)) as server:
        (record,), _ = ask(server, "q")
    assert KEY[:4] not in record["error"]


@pytest.mark.parametrize("bad", ["sk-a\nb", "sk-ä"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(bad, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with Server() as server, pytest.raises(UsageError) as caught:
        ask(server, "q")
    assert "sk-" not in str(caught.value)


def test_a_key_is_needed_for_the_vendor_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server() as server:
        assert ask(server, "q")[0][0]["status"] == "ok"
        server.url = "https://api.openai.com/v1"
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            ask(server, "q")


def test_retry_after_is_honoured():
    with Server(first_faulty(error(429, "wait", {"retry-after": "1.2"}))) as server:
        ask(server, "q")
    assert 1.2 <= server.times[1] - server.times[0] < 2.5


def test_a_wait_beyond_patience_stops_the_run():
    for status in (429, 503):
        tomorrow = error(status, "tomorrow", {"retry-after": "86400"})
        with Server(lambda request, reply=tomorrow: reply) as server:
            _, reason = ask(server, "q")
        assert len(server.requests) == 1
        assert re.search("--patience.*tomorrow", reason)


def test_retry_after_is_a_number_or_a_date():
    assert retry_after_seconds({"retry-after": "2.5"}) == 2.5
    assert retry_after_seconds({"retry-after-ms": "40", "retry-after": "2"}) == 0.04
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 58 < retry_after_seconds({"retry-after": date}) <= 60
    for nonsense in ("", "soon", "-1", "nan", "inf", "0"):
        assert retry_after_seconds({"retry-after": nonsense}) is None


def test_finish_reasons_are_marked():
    def status(**overrides):
        return read_completion(completion("q", **overrides))["status"]

    assert status() == "ok"
    assert status(finish_reason="length") == "truncated"
    assert status(finish_reason="content_filter") == "refused"
    assert status(refusal="I cannot", content=None) == "refused"
    assert status(content="") == status(content=None) == status(content=" \n") == "empty"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("stop", "ok"), ("eos", "ok"), ("eos_token", "ok"), ("end_turn", "ok"), (None, "ok"),
        ("length", "truncated"), ("max_tokens", "truncated"), ("MAX_TOKENS", "truncated"),
        ("content_filter", "refused"),
    ],
)  # fmt: skip
def test_a_finish_reason_is_read_by_its_meaning_and_kept_as_it_was_said(reason, status):
    read = read_completion(completion("q", finish_reason=reason))
    assert (read["status"], read["finish_reason"]) == (status, reason)


@pytest.mark.parametrize(
    ("content", "apart", "answer", "reasoning"),
    [
        ("<think>\nhm\n</think>\n\nfine", {}, "fine", "hm"),
        ("hm\n</think>\nfine", {}, "fine", "hm"),  # the prompt held the opening mark
        (" <think>hm, it never", {}, "", "hm, it never"),
        ("fine", {"reasoning_content": "hm"}, "fine", "hm"),
        ("fine", {"reasoning": "hm", "reasoning_content": "hm"}, "fine", "hm"),
        ("Write `<think>` and `</think>`.", {}, "Write `<think>` and `</think>`.", ""),
        ([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}], {}, "fine", ""),
        (
            [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "fine"}],
            {}, "fine", "hm",
        ),
        ("fine", {"reasoning": {"odd": 1}}, "fine", ""),
    ],
)  # fmt: skip
def test_reasoning_is_kept_apart_from_the_answer(content, apart, answer, reasoning):
    body = completion("q", content=content)
    body["choices"][0]["message"] |= apart
    read = read_completion(body)
    assert (read["answer"], read["reasoning"]) == (answer, reasoning)


def test_reasoning_that_used_up_the_tokens_says_which_flag():
    body = completion("q", content="", finish_reason="length")
    body["choices"][0]["message"]["reasoning_content"] = "hm"
    read = read_completion(body)
    assert read["status"] == "empty"
    assert "--max_tokens" in read["error"]


def test_one_refused_instruction_is_no_refused_key():
    def behave(request):
        return (
            Reply(b"<html>blocked</html>", 403) if request.instruction == "bad" else answer(request)
        )

    with Server(behave) as server:
        records, reason = ask(server, "good", "bad", "good too")
    assert reason is None
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]


@pytest.mark.parametrize(
    ("place", "followed"),
    [
        ("{same}/v1/elsewhere", True),
        ("http://127.0.0.2:1/v1", False),
        ("//localhost/v1", False),
        ("http://127.0.0.1:1/v1", False),
        ("http://127.0.0.1/v1", False),
        ("https{rest}/v1/elsewhere", False),
    ],
)
def test_a_redirect_to_another_server_is_refused(place, followed):
    def behave(request):
        if "elsewhere" in request.path:
            return answer(request)
        same = server.url.removesuffix("/v1")
        rest = same.removeprefix("http")
        return Reply({}, 307, {"location": place.format(same=same, rest=rest)})

    with Server(behave) as server:
        (record,), reason = ask(server, "q")
    if followed:
        assert (record["status"], reason) == ("ok", None)
    else:
        assert len(server.requests) == 1
        assert "redirects to" in reason
        assert record["unmetered_attempts"] == 0


def test_a_redirect_to_the_encrypted_form_of_one_server_is_followed():
    """The usual ports of http and https differ, and are one server's; the way back is not taken."""
    plain, encrypted = (
        httpx2.Request("POST", f"{scheme}://a.b/v1") for scheme in ("http", "https")
    )
    assert _Careful._same_server(plain, encrypted) is encrypted
    for old, new in ((encrypted, plain), (plain, httpx2.Request("POST", "https://a.b:8443/v1"))):
        with pytest.raises(StopRun, match="redirects to"):
            _Careful._same_server(old, new)


def test_a_redirect_in_a_circle_ends():
    with Server(lambda request: Reply({}, 308, {"location": request.path})) as server:
        _, reason = ask(server, "q")
    assert len(server.requests) == 3
    assert "redirects 3 times" in reason


def test_no_proxy_stands_before_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Server() as server:
        assert ask(server, "q")[0][0]["status"] == "ok"


def test_an_address_carries_its_version_and_the_key_in_both_forms():
    with Server() as server:
        server.url += "/deployments/mine?api-version=2024-02-01"
        assert ask(server, "q")[0][0]["status"] == "ok"
    (request,) = server.requests
    assert request.path == "/v1/deployments/mine/chat/completions?api-version=2024-02-01"
    assert request.headers["api-key"] == KEY


def test_nothing_that_a_server_says_has_control_characters(quick):
    wild = "\x1b]0;x\x07\x9b31m \x7f\u0085"
    odd = completion("q", content=f"one\n{wild}") | {"model": wild}
    odd["choices"][0]["finish_reason"] = wild
    with Server(lambda request: Reply(odd)) as server:
        (record,), _ = ask(server, "q")
    with Server(lambda request: error(400, wild)) as server:
        (refused,), _ = ask(server, "q")
    with Server(lambda request: error(401, wild)) as server:
        _, reason = ask(server, "q")
    assert record["answer"].startswith("one\n\ufffd]0;x")
    for text in map(str, (*record.values(), *refused.values(), reason)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_counts_of_tokens_beyond_reason_are_not_believed():
    spending = spend(None)
    usage = {"prompt_tokens": 10**30, "completion_tokens": 5}
    with Server(lambda request: Reply(completion("q") | {"usage": usage})) as server:
        (record,), _ = ask(server, "q", spending=spending)
    assert (record["usage"], record["unmetered_attempts"], spending.spent) == (None, 1, 50)


def test_a_paid_answer_is_kept_whatever_else_the_reply_holds():
    """It can be written to a file, and counts at its worst case where its tokens are unknown."""
    odd = completion("q", content="half \ud83d") | {"model": "m\udc00", "usage": [1]}
    for usage in (
        {"prompt_tokens": 5},
        {"prompt_tokens": 1e999, "completion_tokens": -1},
        None,
        "x",
    ):
        with Server(lambda request, usage=usage: Reply(odd | {"usage": usage})) as server:
            (record,), _ = ask(server, "q")
        assert len(server.requests) == 1
        assert (record["answer"], record["model"]) == ("half ?", "m?")
        assert (record["usage"], record["unmetered_attempts"]) == (None, 1)


def test_every_request_that_may_be_paid_is_on_record_before_it_is_sent(quick):
    """The record counts it already, and the outcome takes its place."""
    kept, seen = [], []

    def behave(request):
        seen.append(kept[-1]["unmetered_attempts"])
        return (error(429, "slow"), Reply(b"{"), error(500, "x"), answer(request))[request.asked]

    with Server(behave) as server:
        (record,), _ = ask(server, "q", kept=kept)
    # The 429 and the 500 cost nothing, so that only the malformed answer needed a second record.
    assert seen == [1, 1, 2, 2]
    assert [each["status"] for each in kept] == ["unanswered"] * 2
    assert record["unmetered_attempts"] == 1


def test_a_stop_in_a_pause_corrects_the_record(quick):
    async def run(server):
        async def keep(record):
            kept.append(record["unmetered_attempts"])

        kept, job = [], job_for(server.url)
        spending = Spending(job, None, None, [])
        client = Client(job, RateBudget(None, None), spending, keep, 2, 3, 60, proven=True)
        asking = asyncio.create_task(client.ask("q", unmetered=5))
        while not server.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        client.stop("enough")
        record = await asyncio.wait_for(asking, 1)
        await client.close()
        assert kept == [6]
        assert (record["status"], record["unmetered_attempts"]) == ("unanswered", 5)

    with Server(lambda request: error(429, "wait", {"retry-after": "30"})) as server:
        asyncio.run(run(server))


def spend(limit):
    """A dollar a token of answer; a request costs at most 50 dollars."""
    return Spending(job_for("unused"), Price(0, 1e6), limit, [])


def test_cost_is_that_of_the_served_tokens_or_the_worst_case(quick):
    spending = spend(None)
    with Server(first_faulty(error(500, "x"), Reply(b"{"), error(429, "x"))) as server:
        ask(server, "q", spending=spending)
    # The 500 and the 429 cost nothing, the malformed answer its worst case, the answer 20 tokens.
    assert spending.spent == 50 + 20


def test_the_cost_bound_counts_requests_in_flight():
    async def run():
        spending = spend(120)
        await spending.reserve(50)
        await spending.reserve(50)
        third = asyncio.create_task(spending.reserve(50))
        await asyncio.sleep(0.05)
        assert not third.done()
        await spending.settle(50, {"prompt_tokens": 9, "completion_tokens": 20}, True)
        await third  # 20 spent and 100 reserved
        await spending.settle(50, None, True)
        await spending.settle(50, None, False)
        assert spending.spent == 70
        await spending.reserve(50)
        await spending.settle(50, None, True)
        with pytest.raises(BudgetReached):
            await spending.reserve(50)

    asyncio.run(run())
