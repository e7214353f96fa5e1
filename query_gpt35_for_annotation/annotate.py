"""Ask GPT-3.5-Turbo, or any OpenAI-compatible server, to answer instructions.

    export OPENAI_API_KEY=...
    python -m query_gpt35_for_annotation.annotate --instructions inference_outputs/mine \\
        --output annotations/mine --dry_run      # tokens and money; nothing is sent
    python -m query_gpt35_for_annotation.annotate --instructions inference_outputs/mine \\
        --output annotations/mine --max_cost 20

Every answer is on the disk (DIR/answers.jsonl) as soon as it is here. After Ctrl-C, a crash or a
stop at --max_cost, the same command goes on where it stopped and pays for nothing twice.

A local annotator needs no key:
    vllm serve MODEL            or: transformers serve MODEL --device cpu
    python -m query_gpt35_for_annotation.annotate --base_url http://localhost:8000/v1 \\
        --model MODEL --instructions inference_outputs/mine --output annotations/mine_local
"""

import math
from dataclasses import dataclass

from query_gpt35_for_annotation.client import (
    ANSWERED,
    FAILED,
    KEEP_REASONING,
    OK,
    Client,
    StopRun,
    say_reasoning,
)
from query_gpt35_for_annotation.job import (
    REMEDY,
    UNANSWERED,
    Job,
    JobSettings,
    RequestSettings,
    answers_file,
    check_folder,
    claim_folder,
    instruction_id,
    number_within,
    pending_instructions,
    read_job,
    read_outcomes,
)
from query_gpt35_for_annotation.spending import Price, PriceSettings, Spending, estimate, price_of
from utils.command_line.parser import answer_early, flag, natural_int, read_flags


@dataclass(frozen=True, kw_only=True)
class RunSettings(PriceSettings, RequestSettings):
    """The flags that `finish_job` reads: those of a request, of its price and of a run."""

    dry_run: bool = flag("estimate tokens and money and send nothing", False)
    max_cost: float | None = flag(
        "US dollars that the whole folder may cost, earlier runs included; the worst case of "
        "requests in flight counts",
        type=number_within(0, math.inf),
        metavar="USD",
    )
    concurrency: int = flag("requests in flight at once, at most", 32, metavar="N")
    requests_per_minute: float | None = flag(
        "your account's request limit; the server's x-ratelimit headers may lower it",
        type=number_within(1, math.inf),
        metavar="N",
    )
    tokens_per_minute: float | None = flag(
        "your account's limit of prompt and answer tokens; likewise",
        type=number_within(1, math.inf),
        metavar="N",
    )
    timeout: float = flag(
        "time for one whole answer; one that comes later is paid for and lost",
        300,
        type=number_within(0.1, 3600),
        metavar="SECONDS",
    )
    max_retries: int = flag(
        "retries an instruction after timeouts, 5xx and dropped connections, with pauses from 0.5 "
        "to 60 s: 10 last about 5 minutes",
        10,
        type=natural_int,
        metavar="N",
    )
    patience: float = flag(
        "stop when no answer came for so long, or the server asks to wait for longer",
        1800,
        type=number_within(1, math.inf),
        metavar="SECONDS",
    )
    keep_reasoning: bool = flag(KEEP_REASONING, False)


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings, JobSettings):
    """The flags of `annotate`."""


answer_early(__name__, Settings, __doc__)

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from itertools import islice
from textwrap import shorten

from query_gpt35_for_annotation.rate_limits import RateBudget
from utils.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    handle_stops,
    run_cli,
    say,
    stop_handlers_restored,
)
from utils.files import JsonlAppender
from utils.folders import locked
from utils.progress import Progress

# So many refusals (400) without an answer between them show that no request of this form is
# welcome: before the first answer, and after it.
_REFUSED_FIRST, _REFUSED_LATER = 10, 100
_REFUSES_ALL = "the server refuses every request: "
# So many instructions in a row, or one a worker, that run out of retries are an outage.
_OUTAGE = 5
# So many paid answers, the first of a run and none of them usable, show that none will be.
_UNUSABLE_FIRST = 20
INTERRUPTED = "interrupted"


class Recorder:
    """Puts records on the disk before their workers go on, many with one sync."""

    def __init__(self, file: JsonlAppender):
        self._file = file
        self._waiting: list[dict] = []
        self._turn = asyncio.Lock()
        self._error: OSError | None = None

    async def keep(self, record: dict) -> None:
        """Return when `record` is on the disk.

        Raises:
            StopRun: the disk takes no more; from then on nothing follows the torn line.
        """
        self._waiting.append(record)
        async with self._turn:
            batch, self._waiting = self._waiting, []
            try:
                if batch and not self._error:
                    await asyncio.to_thread(self._file.append, batch)
            except OSError as error:
                self._error = error
            if self._error:
                raise StopRun(f"answers cannot be written: {self._error}")


class Run:
    """Workers that share one client, one list of instructions and one file.

    Args:
        client: asks.
        recorder: keeps what it brings.
        pending: the instructions to ask.
        unmetered: `unmetered_attempts` on record by instruction id.
        concurrency: workers, at most.
        spending: for the bar.
        usable: whether a record is of any use to the caller.
        keep_reasoning: whether records keep what models wrote before their answers.

    Attributes:
        outcomes: records by their status.
        with_reasoning: records of answers that came with some.
    """

    def __init__(
        self,
        client: Client,
        recorder: Recorder,
        pending: list[str],
        unmetered: dict[str, int],
        concurrency: int,
        spending: Spending,
        usable: Callable[[dict], bool],
        keep_reasoning: bool,
    ):
        self._client = client
        self._recorder = recorder
        self._pending = iter(pending)
        self._unmetered = unmetered
        self._concurrency = min(concurrency, len(pending))
        self._spending = spending
        self._refused: list[dict] = []
        self._unanswered_in_a_row = 0
        self._usable, self._keep_reasoning = usable, keep_reasoning
        self._unusable: Counter[str] | None = Counter()  # None from the first usable one on
        self.outcomes: Counter[str] = Counter()
        self.with_reasoning = 0

    async def finish(self, bar: Progress) -> None:
        """Ask everything, or until the client stops."""
        workers = [self._work(bar) for _ in range(self._concurrency)]
        # One worker's defect must not cost the others the answers that are on their way.
        for error in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(error, BaseException):
                raise error
        unexplained = [each for each in self._refused if not each["blames_instruction"]]
        if unexplained and not self._client.proven:
            self._client.stop(_REFUSES_ALL + unexplained[0]["error"])
        await self._release(UNANSWERED if self._client.stop_reason else FAILED)

    async def _work(self, bar: Progress) -> None:
        try:
            for instruction in self._pending:
                known = self._unmetered.get(instruction_id(instruction), 0)
                record = await self._client.ask(instruction, known)
                if record:
                    await self._settle(record)
                    bar.update(record["status"] != UNANSWERED)
                    bar.set_postfix_str(self._spending.summary(), refresh=False)
                if self._client.stop_reason:
                    return
        except StopRun as reason:
            self._client.stop(str(reason))
        except BaseException as error:
            self._client.stop(f"a defect: {type(error).__name__}")
            raise

    async def _settle(self, record: dict) -> None:
        """Keep the record; a refusal only once the server has shown that it answers others."""
        proven = self._client.proven
        if record["status"] == FAILED and not (proven and record["blames_instruction"]):
            self._refused.append(record)
            if len(self._refused) >= (_REFUSED_LATER if proven else _REFUSED_FIRST):
                self._client.stop(_REFUSES_ALL + record["error"])
            return
        await self._keep(record)
        if record["status"] in ANSWERED:
            self._unanswered_in_a_row = 0
            self._judge(record)
            await self._release(FAILED)
        elif record["status"] == UNANSWERED:
            self._unanswered_in_a_row += 1
            if self._unanswered_in_a_row >= max(self._concurrency, _OUTAGE):
                self._client.stop(
                    f"{self._unanswered_in_a_row} instructions in a row ran out of --max_retries: "
                    f"{record['error']}"
                )

    def _judge(self, record: dict) -> None:
        """Stop before more is paid for where the first answers are all of no use."""
        if self._unusable is None or self._usable(record):
            self._unusable = None
            return
        said = record["error"] or shorten(record["answer"] or "", 60, placeholder=" ...")
        self._unusable[f"{record['status']} ({said!r})" if said else record["status"]] += 1
        if self._unusable.total() == _UNUSABLE_FIRST:
            (example, _), *_ = self._unusable.most_common(1)
            self._client.stop(
                f"the first {_UNUSABLE_FIRST} answers are all unusable, such as {example}; another "
                "--model or --max_tokens may do better, with another --output"
            )

    async def _release(self, status: str) -> None:
        """Keep the refusals that were held back, as `status`."""
        refused, self._refused = self._refused, []
        await asyncio.gather(*(self._keep(record | {"status": status}) for record in refused))

    async def _keep(self, record: dict) -> None:
        self.with_reasoning += "reasoning" in record
        if not self._keep_reasoning:
            record.pop("reasoning", None)
        await self._recorder.keep(record)
        self.outcomes[record["status"]] += 1


async def annotate(run: Run, client: Client, bar: Progress) -> None:
    """Run to the end, to a stop, or to a signal; a Ctrl-C after that does not wait for answers."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def interrupt(number: int) -> None:
        if client.stop_reason and number == signal.SIGINT:
            task.cancel()
        elif not client.stop_reason:
            client.stop(INTERRUPTED)
            say(
                "\nstopping when the answers in flight, which cost money, are here; Ctrl-C again "
                "to leave them"
            )

    # The loop's own way of handling signals would not give back the handlers that it replaces.
    with stop_handlers_restored():
        handle_stops(lambda number, _: loop.call_soon_threadsafe(interrupt, number))
        try:
            await run.finish(bar)
        finally:
            await client.close()


def main(argv: list[str] | None = None) -> int:
    """Annotate from the command line."""
    settings = read_flags(Settings, __doc__, argv)
    # An estimate needs no instruction in memory.
    return finish_job(read_job(settings, in_memory=not settings.dry_run), settings)


def _is_ok(record: dict) -> bool:
    return record["status"] == OK


def finish_job(job: Job, settings: RunSettings, usable: Callable[[dict], bool] = _is_ok) -> int:
    """Ask what the job's folder lacks, or with `--dry_run` estimate it; returns the exit code.

    Args:
        usable: whether an answered record is; if the first of a run are all not, it stops.

    Raises:
        UsageError: a `--max_cost` that cannot be kept, or a folder of another job.
    """
    price, about_price = price_of(settings.model, settings.input_price, settings.output_price)
    say(about_price)
    if settings.max_cost is not None and price is None:
        raise UsageError(f"--max_cost {settings.max_cost:g} needs a price: {about_price}")
    if settings.max_cost is not None and job.max_answer_tokens is None:
        raise UsageError(
            f"--max_cost {settings.max_cost:g} needs a bound on answers; do not name max_tokens in "
            "--drop_parameters"
        )
    if settings.dry_run:
        print_estimate(job, price, settings.limit)
        return EXIT_OK
    # Two processes would pay for the same answers.
    with locked(job.folder, REMEDY):
        return run_job(job, price, settings, usable)


def print_estimate(job: Job, price: Price | None, limit: int | None) -> None:
    """The product of --dry_run, on stdout."""
    outcomes = read_outcomes(job.folder)
    check_folder(job, outcomes)
    found = (outcome["answer_tokens"] for outcome in outcomes.values())
    lengths = [tokens for tokens in found if tokens is not None]
    for line in estimate(pending_instructions(job, outcomes, limit), job, price, lengths):
        print(line)


def run_job(
    job: Job, price: Price | None, settings: RunSettings, usable: Callable[[dict], bool]
) -> int:
    """Ask what the folder lacks and return the exit code."""
    records = claim_folder(job)
    pending = list(pending_instructions(job, records, settings.limit))
    if not pending:
        say(f"nothing left to ask; the answers are in {answers_file(job.folder)}")
        return EXIT_OK
    spending = Spending(job, price, settings.max_cost, list(records.values()))
    unmetered = {key: record["unmetered_attempts"] for key, record in records.items()}
    proven = any(record["status"] in ANSWERED for record in records.values())
    del records
    total = sum(1 for _ in islice(job.instructions, settings.limit))
    done = total - len(pending)
    with (
        JsonlAppender(answers_file(job.folder)) as file,
        Progress(None, "ask", unit="answer", total=total, initial=done) as bar,
    ):
        recorder = Recorder(file)
        client = Client(
            job,
            RateBudget(settings.requests_per_minute, settings.tokens_per_minute),
            spending,
            recorder.keep,
            settings.timeout,
            settings.max_retries,
            settings.patience,
            proven,
        )
        run = Run(
            client,
            recorder,
            pending,
            unmetered,
            settings.concurrency,
            spending,
            usable,
            settings.keep_reasoning,
        )
        try:
            asyncio.run(annotate(run, client, bar))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    done += run.outcomes.total() - run.outcomes[UNANSWERED]
    counts = ", ".join(f"{number:,} {status}" for status, number in run.outcomes.most_common())
    say(f"this run: {counts or 'nothing new'}; {spending.summary()} for the folder so far")
    say_reasoning(run.with_reasoning, settings.keep_reasoning)
    say(f"{done:,} of {total:,} done, in {answers_file(job.folder)}")
    if client.stop_reason:
        say(f"stopped early: {client.stop_reason}")
    elif done == total:
        return EXIT_OK
    say("the same command goes on from here and pays for nothing twice")
    return EXIT_INTERRUPTED if client.stop_reason == INTERRUPTED else EXIT_FAILED


if __name__ == "__main__":
    run_cli(main)
