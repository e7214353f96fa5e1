"""Write sampled answers as AlpacaEval's JSON, for its own judges and leaderboard.

    python -m evaluation.alpaca_eval --answers inference_outputs/mine --output answers.json

The file is a list of objects with `instruction`, `output` and `generator`, which is the job's
name. Answers that were cut at their length limit are in it as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UsageError, run_cli, say
from utils.command_line.parser import flag, read_flags
from utils.files import read_jsonl, write_json
from utils.folders import require_new
from utils.texts.rows import raw_rows

ANSWER_FORMATS = "a folder of shard-*.jsonl from inference.py, or AlpacaEval's .json"


@dataclass(frozen=True)
class Answers:
    """What one system answered.

    Attributes:
        name: of the system.
        texts: the answer to each instruction, in the order of their source; an answer may be empty.
        num_cut: how many of them reached the length limit before their end.
    """

    name: str
    texts: dict[str, str]
    num_cut: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the conversion."""

    answers: Path = flag(f"answers: {ANSWER_FORMATS}", type=Path, required=True, metavar="DIR")
    output: Path = flag("JSON file, which must not exist", type=Path, required=True, metavar="FILE")


def main(argv: list[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, argv)
    output = settings.output
    require_new(output)
    answers = read_answers(settings.answers)
    rows = [
        {"instruction": instruction, "output": text, "generator": answers.name}
        for instruction, text in answers.texts.items()
    ]
    write_json(output, rows)
    say(f"wrote {len(rows):,} answers of {answers.name} to {output}")
    if answers.num_cut:
        say(f"{answers.num_cut:,} of them are cut at their length limit")


def read_answers(path: Path) -> Answers:
    """Read the answers of a sampling run (by sample id), or of a file in AlpacaEval's form.

    A file without `generator` is named after itself.

    Raises:
        UsageError: nothing there, another form, an instruction that is blank or comes twice, the
            answers of several generators, or not one answer with a word in it.
    """
    if not path.exists():
        raise UsageError(f"{str(path)!r} does not exist; answers are {ANSWER_FORMATS}")
    texts: dict[str, str] = {}
    names, num_cut = set(), 0
    rows = _samples(path) if path.is_dir() else _objects(path)
    for where, instruction, text, name, is_cut in rows:
        if not all(isinstance(value, str) for value in (instruction, text, name)):
            raise UsageError(f"{where} lacks an instruction, an answer or a name that is a text")
        try:
            f"{instruction}{text}{name}".encode()
        except UnicodeEncodeError:
            raise UsageError(f"{where} is not valid Unicode") from None
        if not instruction.strip():
            raise UsageError(f"{where} has a blank instruction; win rates need one for each answer")
        if instruction in texts:
            raise UsageError(
                f"{where} answers an instruction that was answered before, {instruction[:60]!r}; "
                "leave one answer for each"
            )
        texts[instruction] = text
        names.add(name)
        num_cut += is_cut
    if not any(text.strip() for text in texts.values()):
        raise UsageError(
            f"{str(path)!r} holds no answer with a word in it; answers are {ANSWER_FORMATS}"
        )
    if len(names) > 1:
        raise UsageError(
            f"{str(path)!r} mixes answers of {len(names)} generators, such as "
            f"{' and '.join(map(repr, sorted(names)[:2]))}; give each a file of its own"
        )
    return Answers(names.pop(), texts, num_cut)


def _samples(folder: Path) -> Iterator[tuple]:
    """Where each sample stands, its prompt, text and job, and whether it was cut; by sample id."""
    samples = [
        (f"{shard}, line {number}", record)
        for shard in sorted(folder.glob("shard-*.jsonl"))
        for number, record in enumerate(read_jsonl(shard), start=1)
    ]
    for where, record in samples:
        if type(record.get("id")) is not int:
            raise UsageError(f"{where} lacks the id of a sample")
    name = folder.resolve().name
    for where, record in sorted(samples, key=lambda sample: sample[1]["id"]):
        is_cut = record.get("finish_reason") == "length"
        yield where, record.get("prompt"), record.get("text"), name, is_cut


def _objects(path: Path) -> Iterator[tuple]:
    """The same for the objects of a file in AlpacaEval's form."""
    for number, row in enumerate(raw_rows(path, form=".json"), start=1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{str(path)!r} is not a JSON list of objects; answers are {ANSWER_FORMATS}"
            )
        name = row.get("generator", path.stem)
        yield f"{path}, object {number}", row.get("instruction"), row.get("output"), name, False


if __name__ == "__main__":
    run_cli(main)
