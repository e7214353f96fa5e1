"""Write instructions as request files for batch mode: half the price, answers within a day.

    python -m query_gpt35_for_annotation.make_batch --instructions data/synthetic.json \\
        --output annotations/synthetic

writes DIR/batch/requests-00001.jsonl and so on, within the vendor's limits (50,000 requests and
200 MB a file). Submit each to the vendor's batch endpoint, or run it on your own machine with
    vllm run-batch -i DIR/batch/requests-00001.jsonl -o results.jsonl --model MODEL
and then merge the results with `python -m query_gpt35_for_annotation.read_batch`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from query_gpt35_for_annotation.job import (
    REMEDY,
    Job,
    JobSettings,
    claim_folder,
    instruction_id,
    pending_instructions,
    read_job,
)
from query_gpt35_for_annotation.spending import PriceSettings, estimate, price_of
from utils.cli import run_cli, say
from utils.command_line.parser import flag, read_flags
from utils.files import write_atomic
from utils.folders import locked

REQUESTS_PER_FILE = 50_000
BYTES_PER_FILE = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Settings(PriceSettings, JobSettings):
    """The flags of `make_batch`."""

    requests_per_file: int = flag(
        "requests a file; the vendor takes at most the default", REQUESTS_PER_FILE, metavar="N"
    )


def request_lines(job: Job, instructions: Iterable[str]) -> Iterator[bytes]:
    """One line of a batch file for each instruction."""
    for instruction in instructions:
        request = {
            "custom_id": instruction_id(instruction),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": job.body(instruction),
        }
        yield json.dumps(request, ensure_ascii=False).encode() + b"\n"


def split_lines(lines: Iterable[bytes], most_lines: int, most_bytes: int) -> Iterator[list[bytes]]:
    """Cut `lines`, in order, into parts of at most so many lines and bytes."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and (len(part) == most_lines or size + len(line) > most_bytes):
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield part


def main(argv: list[str] | None = None) -> None:
    """Write the batch files from the command line."""
    settings = read_flags(Settings, __doc__, argv)
    job = read_job(settings)
    price, about_price = price_of(settings.model, settings.input_price, settings.output_price)
    with locked(job.folder, REMEDY):
        pending = list(pending_instructions(job, claim_folder(job), settings.limit))
        # Numbers go on after those whose results were read, so that no name comes twice.
        used = (job.folder / "batch").glob("requests-*.read")
        first = 1 + max((int(path.stem.partition("-")[2]) for path in used), default=0)
        per_file = min(settings.requests_per_file, REQUESTS_PER_FILE)
        parts = split_lines(request_lines(job, pending), per_file, BYTES_PER_FILE)
        for number, part in enumerate(parts, start=first):
            path = job.folder / "batch" / f"requests-{number:05d}.jsonl"
            write_atomic(path, b"".join(part))
            print(path)
    say(about_price)
    for line in estimate(pending, job, price, []):
        say(line)


if __name__ == "__main__":
    run_cli(main)
