"""One annotation job: what is asked of which model, and the folder that keeps every paid answer.

A folder holds `manifest.json` (model, decoding, server, and the SHA-256 of the files that the
instructions came from), `answers.jsonl` (see
`client.answer_record`; the last record of an instruction counts) and, for the vendor's batch mode,
`batch/`.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from utils.cli import UsageError, say
from utils.command_line.parser import flag, positive_int
from utils.files import hashes_of, placed_records, write_json
from utils.folders import require_same_settings
from utils.texts.text_inputs import FORMATS, entries_of, files_of, say_cut

VENDOR_URL = "https://api.openai.com/v1"
MAX_TOKENS_NAMES = ("max_tokens", "max_completion_tokens")
# The one parameter that an address may have, as Azure's do.
VERSION_PARAMETER = "api-version"
DROPPABLE = ("temperature", "top_p", "max_tokens")
# A record with this status has no outcome yet: the next run asks again.
UNANSWERED = "unanswered"
# What every record has as a text.
TEXTS = ("instruction_sha256", "instruction", "status")
# What a user can do about a folder of answers that is not theirs to go on with.
REMEDY = "name another --output"


def number_within(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, found {text}")
        return value

    return number


def _drop_list(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DROPPABLE:
            raise argparse.ArgumentTypeError(f"knows {', '.join(DROPPABLE)} and not {name!r}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """The flags of a request, and `--limit`."""

    model: str = flag("model name as the server knows it", "gpt-3.5-turbo")
    base_url: str = flag("OpenAI-compatible server, with its /v1", VENDOR_URL)
    temperature: float = flag("of sampling, 0 to 2", 0.7, type=number_within(0, 2))
    top_p: float = flag("nucleus probability, 0 to 1", 0.95, type=number_within(0, 1))
    max_tokens: int = flag("longest answer in tokens", 1024)
    max_tokens_parameter: str = flag(
        "the name under which --max_tokens is sent; newer models refuse the first",
        MAX_TOKENS_NAMES[0],
        choices=MAX_TOKENS_NAMES,
    )
    drop_parameters: list[str] = flag(
        f"parameters not to send, for a model that refuses them: {', '.join(DROPPABLE)}",
        [],
        type=_drop_list,
        metavar="NAME,...",
    )
    limit: int | None = flag(
        "send only the first N requests; raise it later and the rest follows",
        type=positive_int,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """The flags of what is asked, and where the answers go."""

    instructions: str = flag(
        f"what to annotate: {FORMATS}. Exact duplicates are asked once",
        required=True,
        metavar="PATH",
    )
    split: str | None = flag("the split to read where --instructions is a saved DatasetDict")
    output: str = flag(
        "folder for the answers; give the same one again to go on after a stop",
        required=True,
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class JobSettings(RequestSettings, FolderSettings):
    """The flags of a job."""


@dataclass(frozen=True)
class Job:
    """What is asked: one chat request an instruction, all with the same decoding.

    Attributes:
        decoding: the request's parameters other than model and messages.
        instructions: distinct and not blank, in the order of the file; may be read anew whenever
            they are looped over.
        inputs_sha256: of the files that hold them, by path.
    """

    folder: Path
    model: str
    base_url: str
    decoding: dict
    instructions: Iterable[str]
    inputs_sha256: dict[str, str] = field(default_factory=dict)

    def body(self, instruction: str) -> dict:
        """The JSON body of the chat request for `instruction`."""
        messages = [{"role": "user", "content": instruction}]
        return {"model": self.model, "messages": messages, **self.decoding}

    @property
    def max_answer_tokens(self) -> int | None:
        """The bound on an answer's tokens, None where that parameter was dropped."""
        return next(
            (self.decoding[name] for name in MAX_TOKENS_NAMES if name in self.decoding), None
        )

    def manifest(self) -> dict:
        """Who is asked what, and how: the folder's manifest.json."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "decoding": self.decoding,
            "inputs_sha256": self.inputs_sha256,
        }


CUT, BLANK, DUPLICATE, DISTINCT = "cut", "blank", "duplicate", "distinct"


@dataclass(frozen=True)
class Distinct:
    """The distinct instructions of a source that are not blank, read anew in every loop.

    They need not lie in memory: 16 bytes of a hash of each tell them apart.
    """

    path: str
    split: str | None

    def __iter__(self) -> Iterator[str]:
        return self.counted(Counter())

    def counted(self, counts: Counter[str]) -> Iterator[str]:
        """The same; `counts` gets how many texts there are of each kind."""
        seen: set[bytes] = set()
        for text in entries_of(self.path, self.split):
            kind = DISTINCT
            if text is None:
                kind = CUT
            elif not text.strip():
                kind = BLANK
            elif (key := hashlib.blake2b(text.encode(), digest_size=16).digest()) in seen:
                kind = DUPLICATE
            else:
                seen.add(key)
                yield text
            counts[kind] += 1


def read_job(settings: JobSettings, *, in_memory: bool = True) -> Job:
    """Read the instructions and settle what is asked.

    Args:
        in_memory: whether the job is to have its instructions at hand, and not in their file.

    Raises:
        UsageError: unreadable instructions; or see `job_for`.
    """
    counts: Counter[str] = Counter()
    distinct = Distinct(settings.instructions, settings.split)
    kept = [text for text in distinct.counted(counts) if in_memory]
    say_cut(counts.pop(CUT, 0))
    if not counts:
        raise UsageError(f"{settings.instructions!r} holds no instruction")
    say(
        f"{counts.total():,} instructions: {counts[DISTINCT]:,} distinct, "
        f"{counts[DUPLICATE]:,} duplicates asked once, {counts[BLANK]:,} blank left out"
    )
    if not counts[DISTINCT]:
        raise UsageError(f"--instructions {settings.instructions!r} holds blank instructions only")
    hashes = hashes_of(files_of(settings.instructions, settings.split))
    instructions: Iterable[str] = kept if in_memory else distinct
    return job_for(instructions, Path(settings.output), settings, hashes)


def job_for(
    instructions: Iterable[str], folder: Path, settings: RequestSettings, hashes: dict[str, str]
) -> Job:
    """The job of asking `instructions`, distinct and not blank, as the flags say.

    Args:
        hashes: of the files that hold them, by path.

    Raises:
        UsageError: a secret in `--base_url`, or no address there.
    """
    address = urlsplit(settings.base_url)
    names = {name for name, _ in parse_qsl(address.query, keep_blank_values=True)}
    if address.username or address.password or names - {VERSION_PARAMETER}:
        raise UsageError(
            f"--base_url may hold no user name, no password and nothing but {VERSION_PARAMETER} in "
            "its query, since it is written to the manifest; the key goes into the environment "
            "variable OPENAI_API_KEY"
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UsageError(
            f"--base_url {settings.base_url!r} must look like http://localhost:8000/v1"
        )
    decoding = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        settings.max_tokens_parameter: settings.max_tokens,
    }
    for name in settings.drop_parameters:
        del decoding[settings.max_tokens_parameter if name == "max_tokens" else name]
    return Job(
        folder, settings.model, settings.base_url.rstrip("/"), decoding, instructions, hashes
    )


def check_folder(job: Job, records: dict[str, dict]) -> None:
    """Refuse a folder that holds answers to other instructions, or that were asked otherwise.

    Instructions may be added and the server may move, so that what was paid for stays of use.

    Args:
        records: those of `job.folder`, of which the status counts.

    Raises:
        UsageError: names each setting that differs, or counts the other instructions.
    """
    where = f"--output {str(job.folder)!r}"
    others = set(records)
    if others:
        others.difference_update(map(instruction_id, job.instructions))
    if others:
        raise UsageError(
            f"{where} holds records of {len(others):,} instructions that are not in "
            "--instructions; name another --output"
        )
    if not any(is_done(record) for record in records.values()):
        return
    path = job.folder / "manifest.json"
    if not path.exists():
        raise UsageError(f"{where} has answers but no manifest.json; name another --output")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        asked, base_url = {"model": manifest["model"]} | manifest["decoding"], manifest["base_url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is no manifest of answers; restore it, or {REMEDY}") from None
    if base_url != job.base_url:
        say(f"warning: earlier answers came from --base_url {base_url}")
    require_same_settings(
        asked,
        {"model": job.model} | job.decoding,
        f"{where} holds answers to another job, with",
        f"give the old ones, or {REMEDY}",
    )


def claim_folder(job: Job) -> dict[str, dict]:
    """Check the folder and write its manifest.

    Returns:
        Its records, see `read_records`.

    Raises:
        UsageError: see `check_folder`; or a batch waits for its results, and what it may answer
            would be paid for twice.
    """
    records = read_records(job.folder)
    check_folder(job, records)
    for path in waiting_batches(job.folder):
        raise UsageError(
            f"{str(path)!r} waits for its results; merge them with "
            "python -m query_gpt35_for_annotation.read_batch, or delete the file if it was never "
            "submitted"
        )
    write_json(job.folder / "manifest.json", job.manifest())
    return records


def answers_file(folder: Path) -> Path:
    """Where the records of `folder` are."""
    return folder / "answers.jsonl"


def read_records(folder: Path) -> dict[str, dict]:
    """The last record of each instruction in `folder`, by its hash; none where the folder is new.

    Raises:
        UsageError: see `placed_answers`.
    """
    if not answers_file(folder).exists():
        return {}
    return {record["instruction_sha256"]: record for _, record in placed_answers(folder)}


def read_outcomes(folder: Path) -> dict[str, dict]:
    """Of the records of `read_records` the `status` and the `answer_tokens` alone (None: unknown).

    Equal ones are one object, so that a million take 300 MB.

    Raises:
        UsageError: see `placed_answers`.
    """
    found: dict[str, dict] = {}
    known: dict[tuple[str, int | None], dict] = {}
    if answers_file(folder).exists():
        for _, record in placed_answers(folder):
            tokens = record["usage"]["completion_tokens"] if record["usage"] else None
            outcome = {"status": record["status"], "answer_tokens": tokens}
            found[record["instruction_sha256"]] = known.setdefault(
                (record["status"], tokens), outcome
            )
    return found


def placed_answers(folder: Path) -> Iterator[tuple[int, dict]]:
    """Every record in `folder`, after its place in the file, see `utils.files.placed_records`.

    Older versions called the hash of an instruction `id`.

    Raises:
        UsageError: a line is no record.
    """
    path = answers_file(folder)
    for number, (place, record) in enumerate(placed_records(path), start=1):
        if "id" in record:
            record["instruction_sha256"] = record.pop("id")
        if not _is_record(record):
            raise UsageError(
                f"{folder} is missing or not what annotate writes: {path.name}, line {number} is "
                f"no answer; restore it, or {REMEDY}"
            )
        yield place, record


def _is_record(record: dict) -> bool:
    usage = record.get("usage")
    counts = [record.get("unmetered_attempts")]
    if isinstance(usage, dict):
        counts += [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    return (
        all(isinstance(record.get(name), str) for name in TEXTS)
        and re.fullmatch("[0-9a-f]{64}", record["instruction_sha256"]) is not None
        and isinstance(record.get("answer"), str | None)
        and isinstance(usage, dict | None)
        and all(type(count) is int and count >= 0 for count in counts)
    )


def is_done(record: dict) -> bool:
    """Whether the record is an outcome, after which nothing is asked again."""
    return record["status"] != UNANSWERED


def pending_instructions(job: Job, records: dict[str, dict], limit: int | None) -> Iterator[str]:
    """The job's first `limit` instructions, without those whose record has an outcome."""
    done = {key for key, record in records.items() if is_done(record)}
    return (text for text in islice(job.instructions, limit) if instruction_id(text) not in done)


def waiting_batches(folder: Path) -> list[Path]:
    """Batch request files whose results have not been read."""
    return sorted((folder / "batch").glob("requests-*.jsonl"))


def instruction_id(text: str) -> str:
    """The key of an instruction: its SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
