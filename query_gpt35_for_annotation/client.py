"""One answer for one instruction, whatever the server does meanwhile."""

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import openai

from query_gpt35_for_annotation.job import (
    MAX_TOKENS_NAMES,
    UNANSWERED,
    VENDOR_URL,
    Job,
    instruction_id,
)
from query_gpt35_for_annotation.rate_limits import LONGEST_REFUSAL_PAUSE, RateBudget, backoff
from query_gpt35_for_annotation.spending import BudgetReached, Spending, estimated_prompt_tokens
from utils.cli import UsageError, say
from utils.printable import printable, without_controls

# What an answered record's `status` may be; only `ok` goes into a data set.
OK = "ok"
ANSWERED = (OK, "truncated", "refused", "empty")
FAILED = "failed"
# Error codes that concern one instruction, whatever else the request holds.
ABOUT_ONE_INSTRUCTION = (
    "content_filter", "content_policy_violation", "context_length_exceeded", "invalid_prompt",
    "string_above_max_length",
)  # fmt: skip
_TOO_LONG_OR_FILTERED = re.compile(
    r"context (length|window)|too long|content.(filter|policy|management)"
)
_QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# A gateway that gave up waiting: the model behind it may have answered, at a price.
_GATEWAY_STATUS = (502, 504, 520, 522, 524)
_CONNECT_SECONDS = 10
# What a record repeats of a server's error, in characters.
ERROR_LENGTH = 1000
# Finish reasons by their meaning, in lower case; with any other, an answer is whole.
_CUT, _FILTERED = ("length", "max_tokens"), ("content_filter",)
# Beyond these a server means no answer: bytes of a body, tokens of a request, redirects of one.
_MOST_BYTES, _MOST_TOKENS, _MOST_REDIRECTS = 16 << 20, 10**7, 3
# How often it is looked whether a request's time is up.
_TICK_SECONDS = 0.5
THINK, END_OF_THINK = "<think>", "</think>"
KEEP_REASONING = (
    "keep what a model wrote before its answer, as `reasoning` next to the `answer` and never in it"
)


class StopRun(Exception):
    """No request can succeed until the user changes something; the message says what."""


class _Stopping(Exception):
    """The run is about to end, and nothing new may be sent."""


class _Rejected(Exception):
    """The server refuses this request, and would refuse it again.

    Attributes:
        blames_instruction: it said that the instruction is the reason.
    """

    def __init__(self, message: str, blames_instruction: bool):
        super().__init__(message)
        self.blames_instruction = blames_instruction


class _RateLimited(Exception):
    """The server asks for fewer requests."""

    def __init__(self, message: str, retry_after: float | None):
        super().__init__(message)
        self.retry_after = retry_after


class _TryAgain(Exception):
    """A fault that may pass.

    Attributes:
        maybe_paid: the server may have answered, and charged, without the answer arriving.
    """

    def __init__(self, message: str, maybe_paid: bool, retry_after: float | None = None):
        super().__init__(message)
        self.maybe_paid = maybe_paid
        self.retry_after = retry_after


class _Careful(openai.DefaultAsyncHttpxClient):
    """Follows no redirect to another server, and reads no body without end."""

    async def send(self, request: Any, **options: Any) -> Any:
        """Send `request` and read the answer.

        Raises:
            StopRun: a redirect to another server, or too many.
            _TryAgain: the body is too large.
        """
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(_MOST_REDIRECTS):
            response = await super().send(request, **options)
            try:
                if response.next_request is None:
                    return await self._whole(response)
                request = self._same_server(request, response.next_request)
            finally:
                await response.aclose()
        raise StopRun(f"the server redirects {_MOST_REDIRECTS} times; name its own --base_url")

    @staticmethod
    async def _whole(response: Any) -> Any:
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > _MOST_BYTES:
                raise _TryAgain(f"an answer of more than {_MOST_BYTES >> 20} MiB", maybe_paid=True)
        headers = [
            (name, value)
            for name, value in response.headers.multi_items()
            if name not in ("content-encoding", "content-length", "transfer-encoding")
        ]
        return type(response)(
            response.status_code, headers=headers, content=bytes(body), request=response.request
        )

    @staticmethod
    def _same_server(request: Any, following: Any) -> Any:
        old, new = request.url, following.url
        # The usual port of a scheme is None: from http's to https' two ports mean one server.
        usual = (old.scheme, old.port, new.scheme, new.port) == ("http", None, "https", None)
        same = (old.scheme, old.port) == (new.scheme, new.port) or usual
        if new.host != old.host or not same:
            raise StopRun(
                f"the server redirects to {new.scheme}://{new.netloc.decode()}, which would get "
                "the instructions and is not the --base_url; name that if you trust it"
            )
        return following


def _is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Client:
    """Asks instructions of one OpenAI-compatible server, within its budgets.

    Args:
        job: what is asked.
        budget: requests and tokens per minute.
        spending: the cost so far and its bound.
        keep: puts a record on the disk. A request is on record before it is sent, so that a run
            that is killed leaves no payment that the next one does not know of.
        timeout: seconds that one request may take in all.
        max_retries: how often a fault is retried for one instruction; refusals for the rate are
            not counted, since they cost nothing and pass.
        patience: seconds without any answer after which no wait is begun and the run stops.
        proven: whether the server has answered this job's kind of request before.

    Attributes:
        stop_reason: why nothing new is sent; None while the run goes on.

    Raises:
        UsageError: the vendor's server without the environment variable OPENAI_API_KEY.
    """

    def __init__(
        self,
        job: Job,
        budget: RateBudget,
        spending: Spending,
        keep: Callable[[dict], Awaitable[None]],
        timeout: float,
        max_retries: int,
        patience: float,
        proven: bool,
    ):
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UsageError(
                "the environment variable OPENAI_API_KEY holds characters that no key has; copy "
                "the key again"
            )
        if not self._key and job.base_url == VENDOR_URL:
            raise UsageError(
                "set the environment variable OPENAI_API_KEY, or name another server with "
                "--base_url (a local one needs no key)"
            )
        address = urlsplit(job.base_url)
        query = dict(parse_qsl(address.query))
        # Reading has no limit of its own: `_within` counts the time of a whole request.
        limits = openai.Timeout(None, connect=_CONNECT_SECONDS)
        self._api = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=address._replace(query="").geturl(),
            default_query=query,
            # A server with versions in its query takes its key under another name.
            default_headers={"api-key": self._key} if query and self._key else {},
            timeout=limits,
            max_retries=0,
            http_client=_Careful(
                timeout=limits, trust_env=not _is_loopback(address.hostname or "")
            ),
        )
        self._job = job
        self._budget = budget
        self._spending = spending
        self._keep = keep
        self._timeout = timeout
        self._max_retries = max_retries
        self._patience = patience
        self.proven = proven
        self._last_answer = time.monotonic()
        self._answer_tokens, self._answers = job.max_answer_tokens or 0, 1
        self.stop_reason: str | None = None
        self._stopping = asyncio.Event()

    def stop(self, reason: str) -> None:
        """Send nothing new; what is in flight still arrives."""
        self.stop_reason = self.stop_reason or reason
        self._stopping.set()

    async def ask(self, instruction: str, unmetered: int = 0) -> dict | None:
        """Ask until there is an outcome, or the run stops: `stop_reason` then says why.

        Args:
            unmetered: the `unmetered_attempts` on record for this instruction.

        Returns:
            The record to keep: answered, `failed` (refused for good) or `unanswered` (out of
            retries, or stopped). None where nothing was sent.
        """
        faults = refusals = 0
        on_record = unmetered
        problem: Exception | None = None

        async def put_on_record() -> None:
            nonlocal on_record
            if on_record == unmetered:
                why = "the run ended while this request was in flight"
                await self._keep(answer_record(instruction, UNANSWERED, unmetered + 1, error=why))
                on_record += 1

        try:
            while True:
                try:
                    reply = await self._attempt(instruction, put_on_record)
                except _RateLimited as refusal:
                    refusals += 1
                    pause = backoff(refusals, LONGEST_REFUSAL_PAUSE)
                    problem, delay = refusal, refusal.retry_after or pause
                except _TryAgain as fault:
                    faults += 1
                    unmetered += fault.maybe_paid
                    problem, delay = fault, fault.retry_after or backoff(faults)
                    if faults > self._max_retries:
                        break
                except _Rejected as rejection:
                    record = answer_record(instruction, FAILED, unmetered, error=str(rejection))
                    return record | {"blames_instruction": rejection.blames_instruction}
                else:
                    unmetered += reply["usage"] is None
                    return answer_record(instruction, unmetered_attempts=unmetered, **reply)
                if time.monotonic() + delay - self._last_answer > self._patience:
                    raise StopRun(f"no answer within {self._patience:g} s (--patience): {problem}")
                await self._unless_stopping(asyncio.sleep(delay))
        except StopRun as reason:
            problem = reason
            self.stop(str(reason))
        except BudgetReached:
            self.stop("the next request might pass --max_cost; raise it to go on")
        except _Stopping:
            pass
        if problem is None:
            return None
        return answer_record(instruction, UNANSWERED, unmetered, error=str(problem))

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def _attempt(
        self, instruction: str, put_on_record: Callable[[], Awaitable[None]]
    ) -> dict:
        """Send one request when the budgets admit it."""
        tokens = estimated_prompt_tokens(instruction) + self._answer_tokens / self._answers
        worst_case = self._spending.worst_case(instruction)
        await self._unless_stopping(self._admit(tokens, worst_case))
        usage, maybe_paid = None, False
        try:
            if self.stop_reason:
                raise _Stopping
            await put_on_record()
            # Until the server says otherwise, whatever ends this request may leave it paid.
            maybe_paid = True
            reply = await self._send(self._job.body(instruction))
            usage = reply["usage"]
        except _TryAgain as fault:
            maybe_paid = fault.maybe_paid
            raise
        except (_RateLimited, _Rejected, StopRun):
            maybe_paid = False
            raise
        finally:
            await self._spending.settle(worst_case, usage, maybe_paid)
        self._last_answer = time.monotonic()
        self.proven = True
        if usage:
            self._answer_tokens += usage["completion_tokens"]
            self._answers += 1
            self._budget.used(usage["prompt_tokens"] + usage["completion_tokens"] - tokens)
        return reply

    async def _admit(self, tokens: float, worst_case: float) -> None:
        await self._budget.admit(tokens)
        await self._spending.reserve(worst_case)

    async def _within(self, answer: Awaitable[Any]) -> Any:
        """Await a whole answer, at most --timeout of the time that this process has lived through.

        Of a process that is paused, the answers that arrive meanwhile are read when it goes on.

        Raises:
            TimeoutError: there was none.
        """
        task = asyncio.ensure_future(answer)
        try:
            ticks = math.ceil(self._timeout / _TICK_SECONDS)
            # One more: what has arrived at the end of the last is read in it.
            for _ in range(ticks + 1):
                await asyncio.wait({task}, timeout=self._timeout / ticks)
                if task.done():
                    return task.result()
            raise TimeoutError
        finally:
            task.cancel()

    async def _send(self, body: dict) -> dict:
        sent_at = time.monotonic()
        try:
            # The library's timeout starts anew with every byte; a slow drip needs one in all.
            raw = await self._within(self._api.chat.completions.with_raw_response.create(**body))
            self._budget.learn(raw.headers)
            content = json.loads(raw.content)
            failure = _error_in(content)
            if failure is None:
                self._budget.accepted()
                return read_completion(content)
            # Of a status of its own; the answer was begun, so it may be paid.
            inner = openai.APIStatusError("", response=raw.http_response, body=failure)
            problem = self._explain_status(inner, body, _status_of(failure))
            if isinstance(problem, _TryAgain):
                problem.maybe_paid = True
        except TimeoutError:
            raise _TryAgain(f"no whole answer in {self._timeout:g} s (--timeout)", True) from None
        except openai.APIStatusError as error:
            problem = self._explain_status(error, body, error.status_code)
            self._budget.learn(error.response.headers)
        except openai.APIConnectionError as error:
            # A connection that never came to be carried nothing that could be charged.
            cause = type(error.__cause__).__name__
            unsent = cause in ("ConnectError", "ConnectTimeout", "PoolTimeout")
            raise _TryAgain(f"{error.message} ({cause})", maybe_paid=not unsent) from None
        except (ValueError, LookupError, RecursionError) as error:
            # No JSON, no completion, or no text: the library lets such errors of others through.
            raise _TryAgain(f"malformed answer: {self._public(error)}", maybe_paid=True) from None
        if isinstance(problem, _RateLimited):
            self._budget.refused(sent_at, problem.retry_after)
        else:
            self._budget.accepted()
        raise problem

    def _explain_status(self, error: openai.APIStatusError, body: dict, status: int) -> Exception:
        """What an error of a status, of the response or inside it, means for the run."""
        headers = error.response.headers
        codes = (error.code, error.type)
        answer = self._public(f"{status}, {error.response.text}")
        if status == 402 or any(code in _QUOTA_CODES for code in codes):
            return StopRun(f"the account's quota is used up; top it up and run again ({answer})")
        if status == 429:
            return _RateLimited(answer, retry_after_seconds(headers))
        if status in (408, 409) or status >= 500:
            maybe_paid = status in _GATEWAY_STATUS
            return _TryAgain(answer, maybe_paid, retry_after_seconds(headers))
        if status == 403 and self.proven:  # it has taken the key: this is about the instruction
            return _Rejected(answer, blames_instruction=False)
        if status in (401, 403):
            return StopRun(f"the server refuses the key in OPENAI_API_KEY ({answer})")
        if status in (404, 410) or "model_not_found" in codes:
            return StopRun(
                f"the server has no model {body['model']!r}, or no such address. The vendor may "
                "have retired the model: name another with --model. --base_url "
                f"{self._job.base_url!r} should end in /v1 for most servers ({answer})"
            )
        message = answer.lower()
        about_one = status == 413 or any(code in ABOUT_ONE_INSTRUCTION for code in codes)
        if about_one or _TOO_LONG_OR_FILTERED.search(message):
            return _Rejected(answer, blames_instruction=True)
        for name in self._job.decoding:
            # After an answer that these parameters brought, a mention means something else.
            mentioned = not (error.param or self.proven) and re.search(rf"\b{name}\b", message)
            if error.param == name or mentioned:
                return StopRun(
                    f"the model refuses the parameter {name}; {_remedy(name)} ({answer})"
                )
        return _Rejected(answer, blames_instruction=False)

    def _public(self, text: object) -> str:
        """One short line of `text`, without the key: servers have been seen to repeat it."""
        # The key goes first: a cut through it would leave a part that no search finds.
        text = str(text).replace(self._key, "[key]") if self._key else str(text)
        return " ".join(printable(text).split())[:ERROR_LENGTH]

    async def _unless_stopping(self, waiting: Coroutine) -> None:
        """Await `waiting`, but leave it as soon as the run is to stop."""
        wait, stop = asyncio.create_task(waiting), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({wait, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            wait.cancel()
        if not wait.done():
            raise _Stopping
        wait.result()


def answer_record(
    instruction: str,
    status: str,
    unmetered_attempts: int,
    answer: str | None = None,
    model: str | None = None,
    finish_reason: str | None = None,
    usage: dict | None = None,
    error: str | None = None,
    reasoning: str = "",
) -> dict:
    """One line of answers.jsonl.

    Args:
        status: one of `ANSWERED`, `failed` or `unanswered`.
        unmetered_attempts: requests for this instruction, in all runs, that may have been charged
            without telling their tokens.
        model: as the server names it.
        usage: `prompt_tokens` and `completion_tokens`, None where the server gave none.
        reasoning: what the model wrote before its answer; the record has it where there is some.
    """
    return {
        "instruction_sha256": instruction_id(instruction),
        "instruction": instruction,
        "status": status,
        "answer": _storable(answer),
        "model": _storable(model),
        "finish_reason": _storable(finish_reason),
        "usage": usage,
        "unmetered_attempts": unmetered_attempts,
        "error": _storable(error),
    } | ({"reasoning": _storable(reasoning)} if reasoning else {})


def _storable(text: object) -> str | None:
    """`text` without what a server can send and no file should hold: controls, half surrogates."""
    if text is None:
        return None
    return without_controls(str(text).encode("utf-8", "replace").decode())


def read_completion(body: object) -> dict:
    """What a chat completion says: status, answer, reasoning, model, finish_reason and usage.

    Raises:
        ValueError: `body` is not a chat completion, or has no choice.
    """
    try:
        if not isinstance(body, dict):
            raise TypeError
        choice = body["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
        refusal = message.get("refusal")
        reasoning, answer = _parts_of(message)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"not a chat completion: {body}") from None
    meaning, error = str(finish_reason).lower(), None
    if refusal or meaning in _FILTERED:
        status, answer = "refused", answer or str(refusal or "")
    elif not answer.strip():
        status = "empty"
        if reasoning and meaning in _CUT:
            error = "the model used up all tokens to reason; give a higher --max_tokens"
    else:
        status = "truncated" if meaning in _CUT else OK
    return {
        "status": status,
        "answer": answer,
        "reasoning": reasoning,
        "model": body.get("model"),
        "finish_reason": finish_reason,
        "usage": _usage(body.get("usage")),
        "error": error,
    }


def _parts_of(message: dict) -> tuple[str, str]:
    """The reasoning and the answer of a message, in which they may be apart or not."""
    content = message.get("content") or ""
    apart = [message.get(name) for name in ("reasoning_content", "reasoning")]
    if isinstance(content, list):
        is_answer = [part.get("type") in ("text", "output_text") for part in content]
        apart += [part.get("text") for part, of in zip(content, is_answer) if not of]
        content = "".join(part["text"] for part, of in zip(content, is_answer) if of)
    if not isinstance(content, str):
        raise TypeError
    before, ends, answer = content.partition(END_OF_THINK)
    begins = before.lstrip().startswith(THINK)
    # Some servers put the opening mark into the prompt. In the midst of a text it means nothing.
    if begins or (ends and THINK not in before):
        apart.append(before.lstrip().removeprefix(THINK).strip())
        content = answer.lstrip()
    return "\n".join(
        dict.fromkeys(text for text in apart if text and isinstance(text, str))
    ), content


def say_reasoning(count: int, kept: bool) -> None:
    """Tell how many answers came with reasoning, and what became of it."""
    if count:
        what = "kept apart" if kept else "left out (--keep_reasoning keeps it apart)"
        say(f"{count:,} answers came with reasoning, which was {what}")


def _error_in(body: object) -> dict | None:
    """The error that a server reports in place of a completion, or inside its first choice."""
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else body
    error = first.get("error") if isinstance(first, dict) else None
    return error if isinstance(error, dict) else None


def _status_of(error: dict) -> int:
    """The status that an error inside a response names; that of a passing fault where none."""
    code = str(error.get("code") or error.get("status"))
    return int(code) if re.fullmatch("[45][0-9][0-9]", code) else 500


def _usage(usage: object) -> dict | None:
    """The token counts, None where they are missing or make no sense: the answer is paid anyway."""
    names = ("prompt_tokens", "completion_tokens")
    counts = {name: usage.get(name) if isinstance(usage, dict) else None for name in names}
    sensible = all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts.values())
    return counts if sensible else None


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number or a date (RFC 9110, 10.2.3)."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except ValueError:
                continue
        if 0 < seconds < math.inf:
            return seconds
    return None


def _remedy(parameter: str) -> str:
    if parameter in MAX_TOKENS_NAMES:
        other = next(name for name in MAX_TOKENS_NAMES if name != parameter)
        return (
            f"give --max_tokens_parameter {other}, a lower --max_tokens, or "
            "--drop_parameters max_tokens"
        )
    return f"give another --{parameter}, or leave it out with --drop_parameters {parameter}"
