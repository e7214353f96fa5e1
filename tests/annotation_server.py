"""A loopback server that speaks the OpenAI chat protocol and misbehaves as a test asks it to."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

KEY = "sk-secret-0123456789"
MOST_REQUESTS = 50_000
MOST_SECONDS = 600


@dataclass
class Request:
    """What arrived: `number` counts from 0, `asked` how often this instruction came before."""

    number: int
    asked: int
    path: str
    headers: dict
    body: dict

    @property
    def instruction(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class Reply:
    """What goes back. `cut` closes the connection after so many body bytes; `drip` sends one byte
    each so many seconds; `wait` seconds pass before anything is sent."""

    body: dict | bytes
    status: int = 200
    headers: dict = field(default_factory=dict)
    wait: float = 0.0
    cut: int | None = None
    drip: float = 0.0


def completion(instruction: str, **overrides) -> dict:
    """A chat completion that answers `instruction`: 10 prompt tokens, 20 answer tokens."""
    message = {"role": "assistant", "content": f"answer to {instruction}"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    for name, value in overrides.items():
        (choice if name in choice else message)[name] = value
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "fake-0301",
        "choices": [choice],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
    }  # fmt: skip


def error(status: int, message: str, headers: dict | None = None, **fields) -> Reply:
    """An error in the vendor's form."""
    return Reply({"error": {"message": message} | fields}, status, headers or {})


def answer(request: Request) -> Reply:
    """A server that does nothing wrong."""
    return Reply(completion(request.instruction))


def judge(prefer: Callable[[str, str], str]) -> Callable[[Request], Reply]:
    """A server that replies to a judging prompt what `prefer` says of its answers A and B."""

    def behave(request: Request) -> Reply:
        pattern = r"<answer_([AB])>\n(.*?)\n</answer_\1>"
        answers = [text for _, text in re.findall(pattern, request.instruction, re.DOTALL)]
        return Reply(completion(request.instruction, content=prefer(*answers)))

    return behave


class MinuteLimit:
    """A server-side limit: `per_minute`, of which `burst` seconds' worth at once."""

    def __init__(self, per_minute: float, burst: float):
        self.per_minute, self.rate = per_minute, per_minute / 60
        self.capacity = self.level = max(1.0, self.rate * burst)
        self.time = time.monotonic()

    def take(self, amount: float = 1) -> bool:
        now = time.monotonic()
        self.level = min(self.capacity, self.level + self.rate * (now - self.time))
        self.time = now
        allowed = self.level >= amount
        self.level -= amount * allowed
        return allowed


class Server:
    """Runs `behave` for each request, in a thread, on 127.0.0.1, while the context is open."""

    def __init__(
        self, behave: Callable[[Request], Reply] = answer, most_seconds: float = MOST_SECONDS
    ):
        self.behave, self.most_seconds = behave, most_seconds
        self.requests: list[Request] = []
        self.times: list[float] = []
        self.answered: Counter = Counter()  # whole 200 replies by instruction: these are paid
        self.paid: Counter = Counter()  # also those that were cut, dripped or malformed
        self.in_flight = self.most_in_flight = 0
        self._asked: Counter = Counter()

    def __enter__(self) -> "Server":
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=500)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()
            try:
                await asyncio.wait_for(self._stop.wait(), self.most_seconds)
            finally:
                server.close()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()

        asyncio.run(serve())

    async def _talk(self, reader, writer) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    async def _exchange(self, reader, writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, value in (line.split(":", 1) for line in head[1:-2])
        }
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
        instruction = body["messages"][-1]["content"]
        request = Request(
            len(self.requests), self._asked[instruction], head[0].split()[1], headers, body
        )
        assert request.number < MOST_REQUESTS
        self._asked[instruction] += 1
        self.requests.append(request)
        self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._reply(self.behave(request), instruction, reader, writer)
        finally:
            self.in_flight -= 1

    async def _reply(self, reply: Reply, instruction: str, reader, writer) -> bool:
        payload = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"content-type": "application/json", "content-length": len(payload)}
        head = f"HTTP/1.1 {reply.status} X\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in (headers | reply.headers).items()
        )
        await asyncio.sleep(min(reply.wait, MOST_SECONDS))
        self.paid[instruction] += reply.status == 200
        writer.write(head.encode() + b"\r\n" + (b"" if reply.drip else payload[: reply.cut]))
        await writer.drain()
        for byte in payload if reply.drip else b"":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(reply.drip)
        whole = reply.cut is None and isinstance(reply.body, dict) and reply.body.get("choices")
        arrived = reply.status == 200 and whole and not reader.at_eof()
        self.answered[instruction] += bool(arrived)
        return reply.cut is None
