"""The forms of people's prompts and chats: recognised by looking, and read. No torch.

An exchange is an instruction and, where there is one, the answer to it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeGuard

from utils.cli import UsageError
from utils.texts.rows import PARTS, TURNS, listed, names_of_table, raw_rows, row_of, text_of

# Usual names of columns, in small letters, the preferred first.
INSTRUCTIONS = ("instruction", "prompt", "question", "query", "text", "message", "content", "input")
ANSWERS = ("answer", "output", "response", "completion", "reply", "target")
LANGUAGES = ("language", "lang")
# Of these columns a part may stand next to the instruction.
WITH_PARTS = ("instruction", "prompt", "question")
# Who speaks, and what, in a turn of a conversation.
ROLES, WORDS = ("role", "from"), ("content", "value", "text")
USERS = {"user", "human", "prompter"}
ASSISTANTS = {"assistant", "gpt", "chatgpt", "bot", "model", "ai"}
WHICH_TURNS = ("first", "last", "all")
OASST = {"message_id", "parent_id", "role", "text"}
# In place of a column's name: none.
NO_COLUMN = "none"
# Rows that are looked at to recognise a form.
LOOK = 50


class Exchange(NamedTuple):
    """An instruction, and the answer to it; "" where there is none."""

    instruction: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a form the user names; None is to be recognised.

    Attributes:
        text: the column of instructions.
        answer: the column of answers; `NO_COLUMN` for none.
        parts: columns that are joined to the instruction; `NO_COLUMN` for none.
        messages: the column of conversations.
    """

    text: str | None = None
    answer: str | None = None
    parts: tuple[str, ...] | None = None
    messages: str | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """Where in a file's rows instructions and answers stand.

    Attributes:
        name: for people.
        columns: all that the rows have; none for lone texts.
        text, answer, parts: see `Choice`.
        messages: the column of conversations; None where `text` counts.
        role: the column that says who speaks, where a row is one message; a user's rows count.
        is_forest: each row is one message of a tree, as in OASST.
    """

    name: str
    columns: tuple[str, ...]
    text: str = "instruction"
    answer: str | None = None
    parts: tuple[str, ...] = ()
    messages: str | None = None
    role: str | None = None
    is_forest: bool = False

    def column(self, names: Iterable[str]) -> str | None:
        """The first column that has one of these names, whatever its letter case."""
        own = {name.casefold(): name for name in reversed(self.columns)}
        return next((own[name] for name in names if name in own), None)

    def described(self) -> str:
        """What is read, in a line."""
        if not self.columns or self.is_forest:
            return self.name
        if self.messages:
            return f"{self.name}, from the column {self.messages!r}"
        columns = " and ".join(map(repr, (self.text, *self.parts)))
        answers = f", answers from {self.answer!r}" if self.answer else ""
        users = f", where {self.role!r} is a user" if self.role else ""
        return f"{self.name}: instructions from {columns}{answers}{users}"


def recognise(file: Path, choice: Choice, reader: str | None = None) -> Form | None:
    """The form of a file's rows, from the names of its columns and the first `LOOK` rows.

    Args:
        reader: how to read the file; see `raw_rows`.

    Returns:
        None if the file has no row.

    Raises:
        UsageError: it cannot be read, has not a column that `choice` names, or none that is known.
    """
    table = () if reader else tuple(names_of_table(file))
    first = list(islice(raw_rows(file, table, reader), LOOK))
    if not first:
        return None
    rows = [row_of(row, f"{file}, entry {n}") for n, row in enumerate(first, start=1)]
    columns = table or tuple(dict.fromkeys(str(name) for row in rows for name in row))
    named = (choice.text, choice.answer, *(choice.parts or ()), choice.messages)
    for name in named:
        if name not in (None, NO_COLUMN, *columns):
            raise UsageError(f"{file} has no column {name!r}, only {listed(columns)}")
    if all(isinstance(row, str) for row in first):
        return Form(name="texts", columns=())
    form = Form(name="", columns=columns)
    found = None
    if choice.text is None and choice.messages != NO_COLUMN:
        found = _conversations(form, rows, choice.messages, file)
    return found or _texts(form, rows, choice, file)


def exchanges(
    file: Path, form: Form, turn: str, also: Iterable[str] = (), reader: str | None = None
) -> Iterator[tuple[str, dict, list[Exchange]]]:
    """Yield every row of a file: its place, for messages; itself; and what it says.

    Args:
        form: of `recognise`.
        turn: `first`, `last` or `all` of what a user said in a conversation.
        also: other columns that the rows shall have, where the file has them.
        reader: see `recognise`.

    Yields:
        No exchange for a conversation, or a message, in which no user speaks. Texts have no white
        space at their ends; a missing one is "".

    Raises:
        UsageError: a value is not what the form says; names file, row and column.
    """
    wanted = [form.text, form.answer, *form.parts, form.role]
    if form.messages:
        wanted = [form.messages]
    if form.is_forest:
        wanted = [*OASST, "rank", "deleted"]
    names = [name for name in (*wanted, *also) if name]
    entries = (
        (f"{file}, entry {number}", row_of(entry, f"{file}, entry {number}"))
        for number, entry in enumerate(raw_rows(file, names, reader), start=1)
    )
    for place, row in _trees(entries) if form.is_forest else entries:
        if form.role and str(row.get(form.role)).casefold() not in USERS:
            yield place, row, []
        elif form.messages is None:
            said = [_text(row, name, place) for name in (form.text, *form.parts)]
            answer = _text(row, form.answer, place) if form.answer else ""
            yield place, row, [Exchange("\n\n".join(filter(None, said)), answer)]
        else:
            place = f"{place}, column {form.messages!r}"
            value = row.get(form.messages)
            turns = _turns(value)
            if value and not turns and not _is_tree(value):
                raise UsageError(
                    f"{place} holds no list of turns, which are objects with {' or '.join(ROLES)} "
                    f"and {' or '.join(WORDS)}, but is of type {type(value).__name__}"
                )
            spoken = list(_spoken(turns, place))
            yield place, row, {"first": spoken[:1], "last": spoken[-1:]}.get(turn, spoken)


def _conversations(form: Form, rows: list[dict], chosen: str | None, file: Path) -> Form | None:
    """The form of conversations; None if there are none."""
    columns = set(form.columns)
    if columns >= OASST and not chosen:
        return replace(form, name="messages of OASST", messages="replies", is_forest=True)
    if "message_tree_id" in columns and any(isinstance(row.get("prompt"), dict) for row in rows):
        return replace(form, name="trees of OASST", messages="prompt")
    with_turns = [name for name in form.columns if any(_turns(row.get(name)) for row in rows)]
    if chosen and chosen not in with_turns:
        raise UsageError(
            f"--messages {chosen}: in {file} this column holds no list of turns, which are objects "
            f"with {' or '.join(ROLES)} and {' or '.join(WORDS)}"
        )
    column = chosen or replace(form, columns=tuple(with_turns)).column(TURNS)
    if column is None and with_turns and not form.column(INSTRUCTIONS):
        if len(with_turns) > 1:
            raise UsageError(
                f"{file}: the columns {listed(with_turns)} hold conversations; choose one with "
                "--messages NAME"
            )
        column = with_turns[0]
    if column is None:
        return None
    roles = {str(_first(turn, ROLES)) for row in rows for turn in _turns(row.get(column))}
    if not {role.casefold() for role in roles} & USERS:
        shown = ", ".join(role[:40] for role in sorted(roles)[:5])
        raise UsageError(
            f"{file}, column {column!r}: the roles are {shown}, and none is "
            f"{', '.join(sorted(USERS))}; rename them"
        )
    kinds = {
        "rows of WildChat": {"conversation_hash", "conversation"},
        "rows of LMSYS-Chat-1M": {"openai_moderation", "conversation"},
        "conversations of ShareGPT": {"conversations"},
    }
    name = next((kind for kind, names in kinds.items() if names <= columns), "conversations")
    return replace(form, name=name, messages=column)


def _texts(form: Form, rows: list[dict], choice: Choice, file: Path) -> Form:
    """The form of rows whose columns hold texts."""
    has_text = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    of_text = replace(form, columns=tuple(name for name in form.columns if name in has_text))
    text = choice.text or of_text.column(INSTRUCTIONS) or form.column(INSTRUCTIONS)
    if text is None and len(has_text) == 1 and len(form.columns) == 1:
        (text,) = has_text
        # The name of a column, or the first text of a table that names none?
        text = text if len(text) <= 40 and len(text.split()) <= 3 else None
    if text is None:
        raise UsageError(
            f"{file}: no column has a name that is known to hold instructions; say which does with "
            f"--text_column NAME, or conversations with --messages NAME: it has "
            f"{listed(form.columns)}"
        )
    parts, answer = choice.parts, choice.answer
    if parts is None:
        part = of_text.column(PARTS) if text.casefold() in WITH_PARTS else None
        parts = (part,) if part and part != answer else ()
    parts = tuple(name for name in parts if name != NO_COLUMN)
    if answer is None:
        answer = of_text.column(name for name in ANSWERS if name != text.casefold())
        answer = None if answer in parts else answer
    answer = None if answer == NO_COLUMN else answer
    name = "columns of prompts and answers" if answer else "a column of texts"
    if text == "instruction" and answer in ("output", "response"):
        name = {"input": "rows of Alpaca", "context": "rows of Dolly"}.get("".join(parts), name)
    role = of_text.column(ROLES)
    roles = {str(row.get(role)).casefold() for row in rows} if role else set()
    role = role if roles & USERS and roles & ASSISTANTS else None
    return replace(form, name=name, text=text, answer=answer, parts=parts, role=role)


def _text(row: dict, column: str, place: str) -> str:
    value = row.get(column)
    # What is missing is None, and a number that is none in tables of numbers with gaps.
    is_missing = value is None or value != value
    return "" if is_missing else text_of(value, f"{place}, column {column!r}").strip()


def _turns(value: object) -> list[dict]:
    """The turns of a conversation; none if a value is not one.

    They may be a list of objects, an object of lists, the text of such a list, or a tree of OASST.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if _is_tree(value):
        return [] if value.get("deleted") else _best_path(value)
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts)) for parts in zip(*value.values())]
    if not isinstance(value, list) or not value:
        return []
    have_roles = all(isinstance(turn, dict) and turn.keys() & set(ROLES) for turn in value)
    # A turn that calls a tool may have no words.
    return value if have_roles and any(turn.keys() & set(WORDS) for turn in value) else []


def _is_tree(value: object) -> TypeGuard[dict]:
    return isinstance(value, dict) and "replies" in value


def _first(turn: dict, names: Iterable[str]) -> object:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _spoken(turns: list[dict], place: str) -> Iterator[Exchange]:
    """What users said, each with the assistant's answer right after it."""
    for number, turn in enumerate(turns):
        if str(_first(turn, ROLES)).casefold() in USERS:
            following = turns[number + 1 :][:1]
            answers = [t for t in following if str(_first(t, ROLES)).casefold() in ASSISTANTS]
            yield Exchange(_words(turn, place), _words(answers[0], place) if answers else "")


def _words(turn: dict, place: str) -> str:
    """The text of a turn: a text, or parts of which those that are texts are joined."""
    content = _first(turn, WORDS)
    if not isinstance(content, list):
        return "" if content is None else text_of(content, place).strip()
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(text_of(part, place).strip() for part in parts if part is not None)


def _best_path(root: dict) -> list[dict]:
    """From a tree's root along the replies that ranked best, or came first, to an end."""
    path = [root]
    while replies := [reply for reply in path[-1].get("replies") or () if not reply.get("deleted")]:
        path.append(min(replies, key=_rank))
    return path


def _rank(reply: dict) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None or rank != rank else float(rank)


def _trees(entries: Iterator[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """Put the messages of OASST, a tree after another, together: its root, with `replies`.

    Raises:
        UsageError: a message stands before the one that it replies to, or in another tree.
    """
    messages: dict[object, dict] = {}
    root: tuple[str, dict] | None = None
    for place, message in entries:
        message = message | {"replies": []}
        if message.get("parent_id") is None:
            if root:
                yield root[0], root[1] | {"replies": root[1]}
            root, messages = (place, message), {}
        elif message["parent_id"] in messages:
            messages[message["parent_id"]]["replies"].append(message)
        else:
            raise UsageError(
                f"{place}: the message that it replies to does not stand before it in its tree; "
                "sort the rows by tree, roots first"
            )
        messages[message.get("message_id")] = message
    if root:
        yield root[0], root[1] | {"replies": root[1]}
