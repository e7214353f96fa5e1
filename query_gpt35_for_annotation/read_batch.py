"""Merge the results of batch mode into the folder that `make_batch` wrote the requests to.

    python -m query_gpt35_for_annotation.read_batch --output annotations/synthetic \\
        --results output.jsonl errors.jsonl

The records are the same as those of `annotate`. Requests that expired or failed at the server are
left to ask again, with `annotate` or another `make_batch`.
"""

from dataclasses import dataclass

from query_gpt35_for_annotation.client import (
    ABOUT_ONE_INSTRUCTION,
    ERROR_LENGTH,
    FAILED,
    KEEP_REASONING,
    answer_record,
    read_completion,
    say_reasoning,
)
from utils.command_line.parser import answer_early, flag, read_flags


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `read_batch`."""

    output: str = flag("the folder that make_batch was given", required=True, metavar="DIR")
    results: list[str] = flag(
        "the vendor's output and error files, or what vllm run-batch wrote",
        required=True,
        nargs="+",
        metavar="FILE",
    )
    keep_reasoning: bool = flag(KEEP_REASONING, False)


answer_early(__name__, Settings, __doc__)

from collections import Counter
from pathlib import Path

from query_gpt35_for_annotation.job import (
    REMEDY,
    UNANSWERED,
    answers_file,
    is_done,
    read_records,
    waiting_batches,
)
from utils.cli import EXIT_FAILED, EXIT_OK, UsageError, run_cli, say
from utils.files import JsonlAppender, read_jsonl
from utils.folders import locked
from utils.texts.rows import raw_rows


def record_of(result: dict, instruction: str, unmetered: int) -> dict:
    """The record of one line of a result file.

    Args:
        unmetered: the `unmetered_attempts` on record for this instruction.
    """
    response = _object(result.get("response"))
    body = _object(response.get("body"))
    status, error = UNANSWERED, result.get("error") or body.get("error") or body
    if response.get("status_code") == 200:
        try:
            return answer_record(
                instruction, unmetered_attempts=unmetered, **read_completion(body)
            ) | {"batch": True}
        except ValueError as problem:
            unmetered, error = unmetered + 1, problem
    elif response.get("status_code") == 400 and _object(error).get("code") in ABOUT_ONE_INSTRUCTION:
        status = FAILED
    return answer_record(instruction, status, unmetered, error=str(error)[:ERROR_LENGTH])


def _object(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def main(argv: list[str] | None = None) -> int:
    """Merge results from the command line."""
    settings = read_flags(Settings, __doc__, argv)
    folder = Path(settings.output)
    if not (folder / "manifest.json").exists():
        raise UsageError(f"--output {settings.output!r} has no manifest.json; make_batch writes it")
    for path in settings.results:
        if not Path(path).is_file():
            raise UsageError(f"--results {path!r} is not a file")
    with locked(folder, REMEDY):
        return merge(folder, [Path(path) for path in settings.results], settings.keep_reasoning)


def merge(folder: Path, results: list[Path], keep_reasoning: bool) -> int:
    """Add what `results` say about the waiting requests of `folder`; return the exit code."""
    instructions = {
        request["custom_id"]: request["body"]["messages"][-1]["content"]
        for path in waiting_batches(folder)
        for request in read_jsonl(path)
    }
    earlier = read_records(folder)
    done = {key for key, record in earlier.items() if is_done(record)}
    unmetered = {key: record["unmetered_attempts"] for key, record in earlier.items()}
    merged: dict[str, dict] = {}
    outcomes: Counter[str] = Counter()
    for path in results:
        for result in raw_rows(path, form=".jsonl"):
            if not isinstance(result, dict):
                raise UsageError(f"--results {str(path)!r} holds more than objects, one a line")
            key = str(result.get("custom_id"))
            if key in done or key in merged:
                outcomes["already here"] += 1
            elif key not in instructions:
                outcomes["no request of this folder"] += 1
            else:
                merged[key] = record_of(result, instructions[key], unmetered.get(key, 0))
                outcomes[merged[key]["status"]] += 1
    with_reasoning = [record for record in merged.values() if "reasoning" in record]
    for record in with_reasoning:
        if not keep_reasoning:
            del record["reasoning"]
    with JsonlAppender(answers_file(folder)) as file:
        file.append(merged.values())
    missing = instructions.keys() - merged.keys() - done
    for path in waiting_batches(folder):
        if not missing & {request["custom_id"] for request in read_jsonl(path)}:
            path.rename(path.with_suffix(".read"))
    say(", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common()))
    say_reasoning(len(with_reasoning), keep_reasoning)
    if missing:
        say(f"{len(missing):,} requests have no result yet; read the other result files too")
    return EXIT_FAILED if missing or outcomes[UNANSWERED] else EXIT_OK


if __name__ == "__main__":
    run_cli(main)
