"""Make the data set that training reads from files of your own, whatever form their rows have.

    python -m data.prepare_instructions --input prompts.csv --output data/mine \\
        --text_column question --unit_column user_id
    python -m data.prepare_instructions --input chats.jsonl --output data/labelled_mine

Reads csv, tsv, json, jsonl and txt (.gz too), parquet, folders of them, saved data sets, and data
sets of the hub or in its layout. The rows may be a column of texts, prompts and answers, those of
Alpaca or Dolly (whose `input` or `context` is joined to the instruction), conversations (OpenAI's
`messages`, ShareGPT, LMSYS-Chat-1M, WildChat) or OASST's messages and trees. The form is recognised
by its columns and first rows, and shown; the flags name columns where that goes wrong. Of a
conversation a user's message is the instruction and the reply right after it the answer; system and
tool messages are left out. The filters of the paper's data set are in prepare_chatbot_arena.py.

Writes OUTPUT/train.jsonl, val.jsonl and test.jsonl with `instruction`, `answer` where there is one,
and the column of --unit_column; `--dataset_name` of the training generator takes OUTPUT. A name
that starts with `labelled` trains pairs, so there rows without an answer are left out. All of
OUTPUT is private, and its owner alone may enter it; so are the numbers and rows that this script
prints.

No row decides about a row of another unit, so training's guarantee reaches through this script: a
row goes to a split by a hash of its unit (of its instruction where there are no units), and which
rows of a unit --max_rows_per_unit keeps is a secret draw. Only the form, if it is recognised, comes
from the first rows.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import UsageError, run_cli, say  # noqa: E402
from utils.command_line.parser import flag, positive_int, read_flags  # noqa: E402
from utils.files import json_object, write_json  # noqa: E402
from utils.folders import PREPARATION_FILE, claimed, private_folder, whole_folder  # noqa: E402
from utils.progress import Progress  # noqa: E402
from utils.texts.data_sets import DATA_FOLDER, download_files, is_labelled  # noqa: E402
from utils.texts.forms import (  # noqa: E402
    LANGUAGES,
    NO_COLUMN,
    WHICH_TURNS,
    Choice,
    Exchange,
    Form,
    exchanges,
    recognise,
)
from utils.texts.rows import (  # noqa: E402
    DESCRIPTIONS,
    FORMATS,
    WHOLE_TEXT,
    is_readable,
    listed,
    saved_files,
    split_files,
    text_of,
)
from utils.texts.units import OWNERS, is_owner_column, owner_of, rows_to_keep  # noqa: E402

SPLITS = ("train", "val", "test")
SPLIT_SHARES = "train=0.95,val=0.02,test=0.03"
# The unit of rows that come out of one conversation, where no column names another.
CONVERSATION = "conversation"
# What the preparation.json of this script's outputs holds, and no other's.
OWN_ENTRIES = {"arguments", "forms"}
SHOWN_ROWS, SHOWN_LETTERS = 3, 160
CODES = {
    "english": "en", "german": "de", "french": "fr", "spanish": "es", "portuguese": "pt",
    "italian": "it", "dutch": "nl", "russian": "ru", "ukrainian": "uk", "polish": "pl",
    "turkish": "tr", "arabic": "ar", "chinese": "zh", "japanese": "ja", "korean": "ko",
    "vietnamese": "vi", "indonesian": "id", "hindi": "hi", "swedish": "sv", "czech": "cs",
}  # fmt: skip


def split_shares(text: str) -> dict[str, float]:
    """The flag --split: the share of each split, train's above 0, all together 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = -1.0
        if name not in SPLITS or not 0 <= shares[name] <= 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not NAME=SHARE with a name of {', '.join(SPLITS)} and a share from 0 "
                "to 1, such as train=0.95,val=0.02,test=0.03"
            )
    if abs(sum(shares.values()) - 1) > 1e-9 or not shares.get("train"):
        raise argparse.ArgumentTypeError(
            f"{text!r} has shares that sum to {sum(shares.values()):g}, or none for train; they "
            "must sum to 1, such as train=0.95,val=0.02,test=0.03"
        )
    return shares


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """The flags that say what of an input makes a row, and whose it is."""

    text_column: str | None = flag("the column of instructions", metavar="NAME")
    answer_column: str | None = flag(
        f"the column of answers; {NO_COLUMN!r} for no answers", metavar="NAME"
    )
    join_column: list[str] | None = flag(
        f"columns whose text is joined to the instruction after a blank line; {NO_COLUMN!r} for "
        "none", nargs="+", metavar="NAME",
    )  # fmt: skip
    messages: str | None = flag("the column of conversations", metavar="NAME")
    turn: str = flag(
        "which of a user's messages in a conversation make rows; each stands alone, without those "
        "before it", "first", choices=WHICH_TURNS,
    )  # fmt: skip
    unit_column: str | None = flag(
        "the column that says whose a row is, for training with the same flag; one such as user_id "
        f"is recognised; {NO_COLUMN!r} for none; {CONVERSATION!r}, where no column has this name, "
        "for each conversation", metavar="NAME",
    )  # fmt: skip
    owner: str | None = flag(
        "which of several owners of a row counts, where the column holds lists", choices=OWNERS
    )
    unowned_rows_are_units: bool = flag(
        "keep rows without an owner, for training with the same flag; they are left out otherwise",
        False,
    )
    language: str | None = flag(
        "keep rows whose column `language` or `lang` says this, such as English or en",
        metavar="NAME",
    )
    input_split: str | None = flag(
        "which split of an input that has several (train, if left out and there)", metavar="NAME"
    )
    txt_rows: str | None = flag(
        "what a row of .txt files is; if left out, a file of a folder, and a line of a file that "
        "is named itself", choices=("file", "line"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(RowSettings):
    """The flags of this script."""

    input: list[str] = flag(
        "files, folders or hub data sets, read in this order", required=True, nargs="+",
        metavar="PATH_OR_HUB_ID",
    )  # fmt: skip
    output: str = flag(
        "the folder to write, such as data/mine; one whose name starts with 'labelled' is for "
        "training on pairs", required=True, metavar="FOLDER",
    )  # fmt: skip
    max_rows_per_unit: int | None = flag(
        "keep so many rows of a unit at most, by a secret draw", type=positive_int, metavar="ROWS"
    )
    split: dict[str, float] = flag(
        "the share of each split", SPLIT_SHARES, type=split_shares, metavar="SHARES"
    )
    overwrite: bool = flag("replace an output of this script, which is refused otherwise", False)


def main(argv: list[str] | None = None) -> None:
    """Find, recognise, prepare, and show what came out."""
    settings = read_flags(Settings, __doc__, argv)
    if settings.messages not in (None, NO_COLUMN) and settings.text_column:
        raise UsageError("--messages and --text_column name two sources of texts; give one")
    output = Path(settings.output).expanduser()
    with claimed(output):
        prepare(settings, output)


def prepare(settings: Settings, output: Path) -> None:
    """Make the folder `output` of the flags' inputs."""
    require_output(output, settings.overwrite, OWN_ENTRIES)
    files = [found for name in settings.input for found in find_files(name, settings)]
    files = list(dict.fromkeys(files))
    for file, _ in files:
        if file.resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"--output {settings.output!r} would replace {str(file)!r}, which is read; choose "
                "another"
            )
    with whole_folder(output) as folder:
        private_folder(folder, explained=False)
        preparation = Preparation(settings, folder)
        preparation.read(files)
        preparation.finish()
    preparation.show_rows(output)
    say(f"wrote {output}: {', '.join(f'{n} {c:,}' for n, c in preparation.sizes.items())}")
    say(f"next: {preparation.next_command(output)}")


def require_output(output: Path, overwrite: bool, own: set[str]) -> None:
    """Raise a UsageError if `output` must not be made or replaced.

    Args:
        own: what the preparation.json of an output that may be replaced holds.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not own <= json_object(output / PREPARATION_FILE).keys():
        raise UsageError(f"--output {str(output)!r} holds something else; choose another")
    if ledger := next(output.rglob("*_ledger.jsonl"), None):
        raise UsageError(
            f"--output {str(output)!r} has a ledger, {ledger.relative_to(output)}, without which "
            "nobody knows what budget is spent; choose another"
        )
    if not overwrite:
        raise UsageError(
            f"--output {str(output)!r} exists; choose another, or replace it with --overwrite"
        )


def find_files(name: str, settings: Settings) -> list[tuple[Path, str | None]]:
    """The files of one --input, each with the way to read it (None: by its suffix).

    Raises:
        UsageError: there is no such input, nothing in it can be read, or its split is to be named.
    """
    path = Path(name).expanduser()
    try:
        is_here = path.exists()
    except OSError:  # no name that a file may have
        is_here = False
    if not is_here:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or is_readable(path):
            raise UsageError(f"--input {name!r} does not exist")
        path = download_files(name)
    if settings.input_split and (path.is_file() or (path / "state.json").is_file()):
        raise UsageError(f"--input_split {settings.input_split}: {name!r} has no splits")
    if path.is_file():
        if not is_readable(path):
            fix = "save it as CSV in UTF-8" if ".xls" in path.name.lower() else f"take {FORMATS}"
            raise UsageError(f"--input {name!r} has a form that is not known; {fix}")
        return [(path, WHOLE_TEXT if settings.txt_rows == "file" and _is_txt(path) else None)]
    if not path.is_dir():
        raise UsageError(f"--input {name!r} is a pipe or a device; save what it gives in a file")
    if (path / "state.json").is_file():
        return [(file, None) for file in saved_files(path)]
    splits = split_files(path)
    split = settings.input_split or ("train" if "train" in splits else None)
    has_splits = any(path.glob("*/state.json")) or any(
        re.search(r"-\d+-of-\d+", file.name) for file in path.rglob("*-of-*")
    )
    if (settings.input_split or has_splits) and split not in splits:
        raise UsageError(
            f"--input {name!r} has the splits {', '.join(splits) or '(none)'}; take one with "
            "--input_split NAME"
        )
    if split:
        if others := [other for other in splits if other != split]:
            say(f"{name}: reading the split {split!r}, not {', '.join(others)} (--input_split)")
        return [(file, None) for file in splits[split]]
    found = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
    if not found:
        raise UsageError(f"--input {name!r} is a folder without a file that is known: {FORMATS}")
    say(f"{name}: {len(found):,} files")
    by_line = settings.txt_rows == "line"
    return [(file, WHOLE_TEXT if _is_txt(file) and not by_line else None) for file in found]


def _is_txt(file: Path) -> bool:
    return file.name.lower().endswith((".txt", ".txt.gz"))


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file of a folder may hold rows; hidden ones and descriptions do not."""
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_known = is_readable(file) and file.name not in DESCRIPTIONS | {"state.json"}
    return is_known and not is_hidden and file.is_file()


class Preparation:
    """Rows on their way into the splits of a folder.

    Attributes:
        unit_column: where the output says whose a row is; None for nowhere.
        sizes: rows of each split that has any.
        table: rows by what became of them, private.
        forms: what was recognised.
    """

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.pairs = is_labelled(settings.output)
        self.choice = Choice(
            text=settings.text_column,
            answer=settings.answer_column,
            parts=tuple(settings.join_column) if settings.join_column else None,
            messages=settings.messages,
        )
        self.unit_column: str | None = None
        self.sizes: dict[str, int] = {}
        self.table: Counter[str] = Counter()
        self.forms: list[str] = []
        self.has_answers = False
        # The unit of every row of a split, in order; numbers by owner.
        self._units = {name: array("q") for name in SPLITS}
        self._numbers: dict[str, int] = {}
        self._unowned = 0
        self._is_first_file, self._by_conversation = True, False

    def read(self, files: list[tuple[Path, str | None]]) -> None:
        """Write the rows of all files into their splits.

        Raises:
            UsageError: see `recognise` and `exchanges`; or a column of a flag is not there.
        """
        with ExitStack() as stack:
            outputs = {
                name: stack.enter_context(open(self._file(name), "w", encoding="utf-8"))
                for name in SPLITS
            }
            for place, row, said, form in Progress(self._rows(files), "read", unit="row"):
                self._keep(place, row, said, form, outputs)

    def _rows(
        self, files: list[tuple[Path, str | None]]
    ) -> Iterator[tuple[str, dict, list[Exchange], Form]]:
        for file, reader in files:
            form = recognise(file, self.choice, reader)
            if form is None:
                self.table["files without a row"] += 1
                continue
            if form.described() not in self.forms:
                self.forms.append(form.described())
                say(f"{file}: {form.described()}")
            self._require_columns(file, form)
            self._is_first_file = False
            also = [name for name in (self.unit_column, form.column(LANGUAGES)) if name]
            for place, row, said in exchanges(file, form, self.settings.turn, also, reader):
                yield place, row, said, form

    def _require_columns(self, file: Path, form: Form) -> None:
        """Decide about the units, by the first file, and see that a file has what flags ask for."""
        self._decide_units(file, form)
        column = self.unit_column
        if column in ("instruction", "answer"):
            raise UsageError(f"--unit_column {column}: the output has another column of this name")
        if column and not self._by_conversation and column not in form.columns:
            raise UsageError(
                f"--unit_column {column}: {file} has no such column, only {listed(form.columns)}"
            )
        if self.settings.max_rows_per_unit and not column:
            raise UsageError(
                "--max_rows_per_unit needs to know whose a row is; name the column with "
                "--unit_column"
            )
        if form.messages and (self.choice.answer or self.choice.parts):
            raise UsageError(
                f"--answer_column and --join_column are for columns of texts, and {file} has "
                f"{form.described()}; name a column of instructions with --text_column"
            )
        if not form.messages and self.settings.turn != "first":
            raise UsageError(
                f"--turn {self.settings.turn} is for conversations, and {file} has "
                f"{form.described()}; name their column with --messages"
            )
        if self.settings.language and form.column(LANGUAGES) is None:
            raise UsageError(
                f"--language {self.settings.language}: {file} has no column "
                f"{' or '.join(LANGUAGES)}"
            )
        if self.pairs and not form.messages and form.answer is None:
            raise UsageError(
                f"--output {self.settings.output!r}: training takes pairs from a name that starts "
                f"with 'labelled', and {file} has no known column of answers; name it with "
                "--answer_column, or choose another --output"
            )

    def _decide_units(self, file: Path, form: Form) -> None:
        stated = self.settings.unit_column
        owners = [name for name in form.columns if is_owner_column(name)]
        if stated:
            self.unit_column = None if stated == NO_COLUMN else stated
            is_free = CONVERSATION not in form.columns or form.messages == CONVERSATION
            self._by_conversation = stated == CONVERSATION and bool(form.messages) and is_free
        elif not self._is_first_file:
            if owners and (self._by_conversation or not self.unit_column):
                raise UsageError(
                    f"{file} has the column {owners[0]!r}, which seems to say whose a row is, and "
                    "a file before it has none; give files that have it alone, with --unit_column "
                    f"{owners[0]}, or say with --unit_column {self.unit_column or NO_COLUMN} that "
                    f"{'conversations' if self._by_conversation else 'rows'} are meant"
                )
        elif owners:
            self.unit_column = owners[0]
            say(
                f"units: {owners[0]!r} seems to say whose a row is; --unit_column NAME names "
                f"another column, or {NO_COLUMN}"
            )
        elif form.messages and self.settings.turn == "all":
            self.unit_column, self._by_conversation = CONVERSATION, True
            say(f"units: conversations, in the column {CONVERSATION!r}")

    def _keep(
        self, place: str, row: dict, said: list[Exchange], form: Form, outputs: Mapping[str, TextIO]
    ) -> None:
        """Write what is to be kept of one row of an input, and count the rest by its reason."""
        wanted = self.settings.language
        if wanted and language_code(row.get(form.column(LANGUAGES))) != language_code(wanted):
            self.table[f"not {wanted}"] += 1
            return
        if not said:
            self.table["no message of a user"] += 1
            return
        owner = self._owner(place, row, said)
        for exchange in said:
            reason = self._reason_to_drop(exchange, owner)
            self.table[reason or "kept"] += 1
            if reason:
                continue
            split = self.split_of(owner or exchange.instruction)
            kept: dict[str, str | None] = {"instruction": exchange.instruction}
            if exchange.answer:
                kept["answer"] = exchange.answer
                self.has_answers = True
            if self.unit_column:
                kept[self.unit_column] = owner
            outputs[split].write(json.dumps(kept, ensure_ascii=False) + "\n")
            self._units[split].append(self._number(owner))

    def _owner(self, place: str, row: dict, said: list[Exchange]) -> str | None:
        """Whose a row is; None where that is nobody, or not asked."""
        if not self.unit_column:
            return None
        if self._by_conversation:
            # Equal conversations are one unit, and a row's name depends on no other row.
            words = json.dumps(said)
            return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
        where = f"{place}: --unit_column {self.unit_column}"
        value = owner_of(row.get(self.unit_column), self.settings.owner, where)
        # As texts, so that an owner who is 7 here and "7" there is one.
        return None if value is None else text_of(str(value), where).strip() or None

    def _reason_to_drop(self, exchange: Exchange, owner: str | None) -> str | None:
        if not exchange.instruction:
            return "empty"
        if self.pairs and not exchange.answer:
            return "no answer"
        is_unowned = bool(self.unit_column) and owner is None
        return "no owner" if is_unowned and not self.settings.unowned_rows_are_units else None

    def split_of(self, key: str) -> str:
        """The split of a unit or an instruction, by a hash of that alone."""
        digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"split").digest()
        place, end = int.from_bytes(digest, "big") / 2**64, 0.0
        for name, share in self.settings.split.items():
            end += share
            if place < end:
                return name
        return "train"  # the shares sum to a little less than 1

    def _number(self, owner: str | None) -> int:
        if owner is None:
            self._unowned += 1
            return -self._unowned
        return self._numbers.setdefault(owner, len(self._numbers))

    def finish(self) -> None:
        """Draw the rows of each unit that stay, and say what was kept.

        Raises:
            UsageError: no row is left to train on.
        """
        if self.settings.max_rows_per_unit:
            for name in SPLITS:
                self._draw(name, self.settings.max_rows_per_unit)
        for name in SPLITS:
            if count := len(self._units[name]):
                self.sizes[name] = count
            else:
                self._file(name).unlink()
        say("private, not for sharing:")
        total = max(1, self.table.total())
        for reason, count in self.table.most_common():
            say(f"  {reason:<24}{count:>12,}{count / total:>9.1%}")
        if self._numbers:
            say(f"  {'units':<24}{len(self._numbers):>12,}")
        if "train" not in self.sizes:
            raise UsageError("no row is left to train on; the table above says why")
        write_json(
            self.folder / PREPARATION_FILE,
            {
                "arguments": asdict(self.settings),
                "forms": self.forms,
                "unit_column": self.unit_column,
                "rows": self.table,
                "splits": self.sizes,
            },
        )

    def _draw(self, split: str, most: int) -> None:
        """Keep so many rows of each unit of a split at most; every choice is equally likely."""
        # It brings torch, which takes a second.
        import numpy as np

        from utils.secure_random import SecureRandom

        units = np.array(self._units[split])
        order = np.argsort(SecureRandom().uint64(len(units)))
        stays = np.zeros(len(units), bool)
        stays[order[rows_to_keep(units[order], most)]] = True
        dropped = int((~stays).sum())
        if dropped:
            self.table["kept"] -= dropped
            self.table["above the cap of a unit"] += dropped
            whole, drawn = self._file(split), self.folder / f".{split}"
            with (
                open(whole, encoding="utf-8", newline="\n") as lines,
                open(drawn, "w", encoding="utf-8") as file,
            ):
                file.writelines(line for line, stay in zip(lines, stays) if stay)
            drawn.replace(whole)
            self._units[split] = array("q", units[stays])

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"

    def show_rows(self, output: Path) -> None:
        """Print the first rows."""
        with open(output / "train.jsonl", encoding="utf-8", newline="\n") as lines:
            for line, _ in zip(lines, range(SHOWN_ROWS)):
                for name, text in json.loads(line).items():
                    letters = " ".join(str(text)[:SHOWN_LETTERS].split())
                    say(f"  {name}: {letters}{'...' * (len(str(text)) > SHOWN_LETTERS)}")
                say("")

    def next_command(self, output: Path) -> str:
        """The training command for what was made, to be filled in."""
        own = output.parent == DATA_FOLDER
        name = shlex.quote(output.name if own else str(output))
        words = [f"python generate_train_command.py --dataset_name {name}"]
        if self.unit_column:
            most = self.settings.max_rows_per_unit or "K"
            words.append(
                f"--unit_column {shlex.quote(self.unit_column)} --max_rows_per_unit {most}"
            )
            # So that reports say for whom of them the guarantee is not.
            words += [f"--owner {self.settings.owner}"] if self.settings.owner else []
            if self.settings.unowned_rows_are_units:
                words.append("--unowned_rows_are_units")
        words.append(f"--prompt_style {'vicuna' if self.pairs else 'uncond_generation'} ...")
        if self.has_answers and not self.pairs:
            words.append("(answers train from a name that starts with 'labelled')")
        return " ".join(words)


def language_code(name: object) -> str:
    """A language's name or code (English, en-US) in one form."""
    word = re.split(r"[-_ ]", str(name).casefold().strip())[0]
    return CODES.get(word, word)


if __name__ == "__main__":
    run_cli(main)
