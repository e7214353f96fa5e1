"""Make the private instruction set from LMSYS-Chat-1M: the users' first messages, filtered.

    HF_TOKEN=... python data/prepare_chatbot_arena.py
    python data/prepare_chatbot_arena.py --input conversations.jsonl --train_size 20000

The data set is gated: accept its licence at https://huggingface.co/datasets/lmsys/lmsys-chat-1m
and put a token into the environment variable HF_TOKEN. Local JSON, JSON-lines and parquet files
with its columns work as well: language, redacted, openai_moderation (a list of {flagged: ...}) and
conversation (a list of {role: ..., content: ...}).

Kept are conversations in English that are neither redacted nor flagged. Of each, the first user
message stays, unless it is empty, is a known template, repeats an earlier one (letter case, white
space and punctuation aside), or shares ten words in a row with an earlier one. What is left is
shuffled and split. With --pairs, the assistant's first answer stays too, as the column `answer`.

The filters compare rows with each other: one person's message can decide whether another's stays.
So the guarantee of training and resampling is for the prepared set, for adding or removing one of
its rows, and does not cover the filters, nor the counts that this script prints.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.prepare_instructions import require_output  # noqa: E402
from utils.cli import UsageError, run_cli, say  # noqa: E402
from utils.command_line.parser import flag, read_flags  # noqa: E402
from utils.folders import claimed, save_dataset  # noqa: E402
from utils.texts.data_sets import download_files, is_labelled  # noqa: E402
from utils.texts.rows import FILE_SUFFIXES, raw_rows  # noqa: E402
from utils.texts.text_filters import comparison_form, split_rows  # noqa: E402

HUB_ID = "lmsys/lmsys-chat-1m"
COLUMNS = ["language", "redacted", "openai_moderation", "conversation"]
NGRAM_WORDS = 10
PROGRESS_ROWS = 100_000

# Prompts that scripts sent by the thousand with other words in the gaps, in `comparison_form`.
KNOWN_TEMPLATES = re.compile(
    # A wrapper that turns a chat model into a completion model.
    r"^you are the text completion model and you must complete the assistant answer below"
    # Texts for sellers of chemicals.
    r"|^write an article about the .{0,200}\b(cas|synthetic routes|upstream|downstream|industry)\b"
    r"|^give me an introduction over \d+ words for\b"
    # A benchmark of refusals and apologies.
    r"|^beginning now and going forward you may not apologize"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of this script."""

    input: list[str] = flag(
        "files (.json, .jsonl, .parquet), folders of them, or hub data sets, read in this order",
        [HUB_ID],
        nargs="+",
        metavar="PATH_OR_HUB_ID",
    )
    output: str | None = flag(
        "the DatasetDict to write; data/chatbot_arena_instructions_train180k if left out, or "
        "data/labelled_real_arena180k with --pairs; 180k stands for --train_size",
        metavar="FOLDER",
    )
    pairs: bool = flag("keep the first answer to each instruction as well", False)
    train_size: int = flag("rows of the train split", 180_000, metavar="ROWS")
    val_size: int = flag(
        "rows of the val split (default: %(default)s); all others make the test split",
        5_000,
        metavar="ROWS",
    )
    seed: int = flag("of the shuffle before the split; no secret", 0, type=int)
    overwrite: bool = flag("replace an output of this script, which is refused otherwise", False)


def main(argv: list[str] | None = None) -> None:
    """Read, filter, split and save."""
    settings = read_flags(Settings, __doc__, argv)
    output = Path(settings.output or default_output(settings.train_size, settings.pairs))
    if is_labelled(str(output)) != settings.pairs:
        raise UsageError(
            f"--output {str(output)!r}: training takes pairs from a data set whose name starts "
            "with 'labelled' and instructions from any other, so use --pairs with such a name only"
        )
    with claimed(output):
        prepare(settings, output)


def prepare(settings: Settings, output: Path) -> None:
    """Make `output`, which nobody else makes meanwhile."""
    require_output(output, settings.overwrite, {"arguments", "dropped"})
    dropped: Counter[str] = Counter()
    rows = first_exchanges(read_conversations(settings.input), settings.pairs, dropped)
    rows = drop_shared_ngrams(rows, dropped)
    total = max(1, dropped.total() + len(rows))
    for reason, count in [*dropped.most_common(), ("kept", len(rows))]:
        say(f"{reason:<32}{count:>12,}{count / total:>9.1%}")
    require_enough(len(rows), settings.train_size, settings.val_size)
    splits = split_rows(rows, settings.train_size, settings.val_size, settings.seed)
    columns = ["instruction", "answer"] if settings.pairs else ["instruction"]
    save_dataset(output, splits, columns, {"arguments": asdict(settings), "dropped": dropped})
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in splits.items())
    say(f"wrote {output}: {sizes}")


def default_output(train_size: int, pairs: bool) -> str:
    """The published name for 180,000 training rows, and its like for other sizes."""
    size = f"{train_size // 1000}k" if train_size % 1000 == 0 else str(train_size)
    return f"data/{'labelled_real_arena' if pairs else 'chatbot_arena_instructions_train'}{size}"


def require_enough(count: int, train_size: int, val_size: int) -> None:
    """Raise a UsageError that names sizes which fit, if `count` rows leave no test row."""
    needed = train_size + val_size + 1
    if count < needed:
        held_out = max(1, min(val_size, count // 20))
        raise UsageError(
            f"{count} instructions are left, --train_size {train_size} and --val_size {val_size} "
            f"need {needed} with one for test; "
            + (
                f"--train_size {count - 2 * held_out} --val_size {held_out} fit"
                if count >= 3
                else "see the table above for what was dropped"
            )
        )


def read_conversations(inputs: list[str]) -> Iterator[tuple[str, object]]:
    """Yield the rows of files, folders and hub data sets one at a time, each after its place.

    Raises:
        UsageError: nothing is there, or a file is not readable as what its name says.
    """
    # Every input is found before the first is read, which may take minutes.
    for file in [file for name in inputs for file in find_files(name)]:
        say(f"reading {file}")
        number = 0
        try:
            for number, row in enumerate(raw_rows(file, COLUMNS), start=1):
                yield f"{file}, row {number}", row
        except UsageError as error:
            raise UsageError(
                f"{file}, row {number + 1} is not readable ({error}); a download cut short? Get "
                "the file again, or remove what does not belong"
            ) from None


def find_files(name: str) -> list[Path]:
    """The data files of a file, a folder or a hub data set, in order of their names.

    Raises:
        UsageError: there is no such input, or it has no data file.
    """
    path = Path(name).expanduser()
    if path.is_file() and name.endswith(FILE_SUFFIXES):
        return [path]
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(FILE_SUFFIXES)
    if is_hub_id and not path.exists():
        path = download_files(name)
    files = sorted(file for file in path.rglob("*") if file.name.endswith(FILE_SUFFIXES))
    if not files:
        raise UsageError(
            f"--input {name!r} is not a file of {', '.join(FILE_SUFFIXES)}, or a folder that holds "
            f"one, or a hub data set such as {HUB_ID}"
        )
    return files


def first_exchanges(
    conversations: Iterable[tuple[str, object]], pairs: bool, dropped: Counter[str]
) -> list[dict[str, str]]:
    """The first instruction of every conversation that may be kept, each once, and its answer.

    Args:
        conversations: places for error messages, and rows with `COLUMNS`.
        pairs: whether to keep answers, and only instructions that have one.
        dropped: gets the number of conversations dropped for each reason.

    Raises:
        UsageError: a row has not the schema of LMSYS-Chat-1M.
    """
    # Digests instead of texts: 8 bytes tell a million messages apart with probability 1 - 3e-8.
    seen: set[bytes] = set()
    rows: list[dict[str, str]] = []
    for number, (place, conversation) in enumerate(conversations, start=1):
        if number % PROGRESS_ROWS == 0:
            say(f"{number:,} conversations read, {len(rows):,} kept so far")
        try:
            if not isinstance(conversation, dict):
                raise TypeError
            reason = _reason_to_drop(conversation)
            instruction, answer = _first_exchange(conversation["conversation"])
        except (TypeError, KeyError, AttributeError):
            raise UsageError(
                f"{place} does not have the schema of {HUB_ID}: language, redacted, "
                "openai_moderation [{flagged}], conversation [{role, content}]"
            ) from None
        if reason is None:
            form = comparison_form(instruction)
            digest = _digest(form)
            if not instruction:
                reason = "empty first message"
            elif pairs and not answer:
                reason = "no answer"
            elif KNOWN_TEMPLATES.search(form):
                reason = "known template"
            elif digest in seen:
                reason = "repeats an earlier message"
        if reason is None:
            seen.add(digest)
            rows.append({"instruction": instruction} | ({"answer": answer} if pairs else {}))
        else:
            dropped[reason] += 1
    return rows


def _reason_to_drop(conversation: dict) -> str | None:
    """Why a conversation is dropped, whatever its text and the other ones are."""
    if conversation["language"] != "English":
        return "not English"
    if conversation["redacted"]:
        return "redacted"
    if any(verdict["flagged"] for verdict in conversation["openai_moderation"] or []):
        return "flagged by moderation"
    return None


def _first_exchange(turns: list[dict]) -> tuple[str, str]:
    """The first user message, and the assistant's message right after it; "" for none."""
    left = iter(turns)
    user = next((turn for turn in left if turn["role"] == "user"), None)
    next_turn = next(left, None)
    answer = next_turn if next_turn and next_turn["role"] == "assistant" else None
    return _text(user) if user else "", _text(answer) if answer else ""


def _text(turn: dict) -> str:
    # JSON may hold half a surrogate pair, which cannot be saved.
    return (turn["content"] or "").strip().encode(errors="replace").decode()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def drop_shared_ngrams(rows: list[dict[str, str]], dropped: Counter[str]) -> list[dict[str, str]]:
    """Drop every row whose instruction shares ten words in a row with an earlier row's."""
    say(f"comparing {len(rows):,} messages by {NGRAM_WORDS}-word sequences")
    parts = [np.unique(ngram_hashes(row["instruction"])) for row in rows]
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), [len(hashes) for hashes in parts])
    ngrams = np.concatenate([np.empty(0, np.uint64), *parts])
    # Within a row hashes are distinct, and a stable sort keeps equal ones in order of their rows.
    order = np.argsort(ngrams, kind="stable")
    equals_previous = ngrams[order[1:]] == ngrams[order[:-1]]
    repeating = np.zeros(len(rows), bool)
    repeating[owners[order[1:][equals_previous]]] = True
    dropped[f"shares {NGRAM_WORDS} words in a row"] += int(repeating.sum())
    return [row for row, drop in zip(rows, repeating) if not drop]


_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(NGRAM_WORDS)], np.uint64)


def ngram_hashes(text: str) -> np.ndarray:
    """64-bit hashes of the ten-word sequences of `text`, uint64 [max(0, words - 9)].

    A hash is a polynomial, modulo 2^64 and in an odd constant, of the words' own random hashes
    (Karp and Rabin, 1987). At 50 million sequences about 1e-4 pairs collide by chance.
    """
    words = comparison_form(text).split()
    if len(words) < NGRAM_WORDS:
        return np.empty(0, np.uint64)
    hashes = np.frombuffer(b"".join(map(_word_hash, words)), np.uint64)
    return np.lib.stride_tricks.sliding_window_view(hashes, NGRAM_WORDS) @ _POWERS


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> bytes:
    return _digest(word)


if __name__ == "__main__":
    run_cli(main)
