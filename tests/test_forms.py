"""Forms of rows: what is recognised, and what an exchange is in each."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.json_lines import jsonl
from utils.cli import UsageError
from utils.texts.forms import WHICH_TURNS, Choice, exchanges, recognise


def turns(*words, roles=("user", "assistant"), keys=("role", "content")):
    speakers = roles * len(words)
    return [dict(zip(keys, pair)) for pair in zip(speakers, words)]


def parts(text):
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "x"}}]


def message(number, parent, role, text, **others):
    return {"message_id": number, "parent_id": parent, "role": role, "text": text} | others


CHAT = turns("Hi?", "Yes.")
TREE = {"role": "prompter", "text": "Hi?", "replies": [
    {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
    {"role": "assistant", "text": "Yes.", "rank": 0, "replies": []},
]}  # fmt: skip
SHAREGPT = turns("Hi?", "Yes.", roles=("human", "gpt"), keys=("from", "value"))
# Each says Hi? and, where the name of the form knows answers, Yes.
FORMS = {
    "rows of Alpaca: instructions from 'instruction' and 'input', answers from 'output'": [
        {"instruction": "Hi?", "input": "", "output": "Yes.", "text": "Below is"}
    ],
    "rows of Dolly: instructions from 'instruction' and 'context', answers from 'response'": [
        {"instruction": "Hi?", "context": "", "response": "Yes.", "category": "chat"}
    ],
    "columns of prompts and answers: instructions from 'prompt', answers from 'completion'": [
        {"id": 1, "prompt": " Hi?\n", "completion": "Yes."}
    ],
    "columns of prompts and answers: instructions from 'input', answers from 'output'": [
        {"input": "Hi?", "output": "Yes."}
    ],
    "columns of prompts and answers: instructions from 'Prompt', answers from 'Answer'": [
        {"Answer": "Yes.", "Prompt": "Hi?"}
    ],
    "a column of texts: instructions from 'text'": [
        {"id": 1, "user_id": "u", "text": "Hi?", "ts": 3}
    ],
    "a column of texts: instructions from 'ticket'": [{"ticket": "Hi?"}],
    "texts": ["Hi?"],
    "conversations, from the column 'messages'": [
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
        {"messages": [{"role": "user", "content": parts("Hi?")}, CHAT[1]]},
    ],
    "conversations, from the column 'dialog'": [{"dialog": CHAT}],
    "conversations, from the column 'conversation'": [{"conversation": json.dumps(CHAT)}],
    "conversations of ShareGPT, from the column 'conversations'": [
        {"id": "a", "conversations": SHAREGPT},
        {"id": "b", "conversations": [{"from": "gpt", "value": "Welcome."}, *SHAREGPT]},
    ],
    "rows of LMSYS-Chat-1M, from the column 'conversation'": [
        {"language": "English", "openai_moderation": [{"flagged": False}], "conversation": CHAT}
    ],
    "rows of WildChat, from the column 'conversation'": [
        {"conversation_hash": "h", "openai_moderation": [], "conversation": CHAT}
    ],
    "messages of OASST": [
        message("a", None, "prompter", "Hi?"),
        message("b", "a", "assistant", "No.", rank=1),
        message("c", "a", "assistant", "Yes.", rank=0),
        message("d", "a", "assistant", "Bad.", deleted=True),
        message("e", None, "prompter", "Hi?"),
        message("f", "e", "assistant", "Yes."),
    ],
    "trees of OASST, from the column 'prompt'": [{"message_tree_id": "a", "prompt": TREE}],
}  # fmt: skip


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else jsonl(rows))
    return path


def exchanges_in(file, choice=None, turn="first"):
    form = recognise(file, choice or Choice())
    return [said for _, _, said in exchanges(file, form, turn)]


NO_TABLES = ("texts", "messages of OASST")


@pytest.mark.parametrize(
    ("described", "suffix"),
    [
        (described, suffix)
        for described in FORMS
        for suffix in (".json", ".jsonl", ".parquet")
        if suffix != ".parquet" or described not in NO_TABLES
    ],
)
def test_a_form_is_recognised_and_read(described, suffix, tmp_path):
    rows = FORMS[described]
    file = write(tmp_path / f"a{suffix}", rows[:1] if suffix == ".parquet" else rows)
    assert recognise(file, Choice()).described() == described
    found = exchanges_in(file)
    assert found
    answer = "" if "texts" in described else "Yes."
    assert all(said == [("Hi?", answer)] for said in found)


def test_messages_of_oasst_may_be_a_table(tmp_path):
    rows = FORMS["messages of OASST"]
    names = {name for row in rows for name in row}
    complete = [{name: row.get(name) for name in names} for row in rows]
    file = write(tmp_path / "a.parquet", complete)
    assert exchanges_in(file) == [[("Hi?", "Yes.")]] * 2


def test_parts_are_joined_to_the_instruction_and_may_be_named(tmp_path):
    rows = [{"instruction": "Sort.", "input": " b a ", "topic": "letters", "output": "a b"}]
    file = write(tmp_path / "a.json", rows)
    assert exchanges_in(file) == [[("Sort.\n\nb a", "a b")]]
    for choice, said in [
        (Choice(parts=("none",)), ("Sort.", "a b")),
        (Choice(parts=("topic", "input")), ("Sort.\n\nletters\n\nb a", "a b")),
        (Choice(answer="none"), ("Sort.\n\nb a", "")),
        (Choice(text="topic", answer="input"), ("letters", "b a")),
    ]:
        assert exchanges_in(file, choice) == [[said]]


@pytest.mark.parametrize("turn", WHICH_TURNS)
def test_any_turn_of_a_user_may_be_taken(turn, tmp_path):
    silent = [{"role": "assistant", "content": "Hello?"}]
    called = [CHAT[0], {"role": "assistant", "tool_calls": []}, {"role": "tool", "content": None}]
    twice = turns("Once", "Twice", roles=("user",))
    rows = [{"messages": turns("A", "B", "C", "D", "E")}, *({"messages": m} for m in (
        silent, called, twice))]  # fmt: skip
    expected = {
        "first": [[("A", "B")], [], [("Hi?", "")], [("Once", "")]],
        "last": [[("E", "")], [], [("Hi?", "")], [("Twice", "")]],
        "all": [
            [("A", "B"), ("C", "D"), ("E", "")], [], [("Hi?", "")], [("Once", ""), ("Twice", "")],
        ],
    }  # fmt: skip
    assert exchanges_in(write(tmp_path / "a.jsonl", rows), turn=turn) == expected[turn]


def test_a_conversation_may_be_an_object_of_lists_or_a_text_in_a_table(tmp_path):
    columns = {"role": ["user", "assistant"], "content": ["Hi?", "Yes."]}
    for name, value in (("a.json", columns), ("a.csv", json.dumps(CHAT))):
        assert exchanges_in(write(tmp_path / name, [{"messages": value}])) == [[("Hi?", "Yes.")]]


def test_of_a_table_of_messages_those_of_users_count(tmp_path):
    rows = [{"chat": 1, "role": turn["role"], "content": turn["content"]} for turn in CHAT]
    file = write(tmp_path / "a.csv", rows)
    assert recognise(file, Choice()).described().endswith("from 'content', where 'role' is a user")
    assert exchanges_in(file) == [[("Hi?", "")], []]
    jobs = [{"role": "clerk", "text": "Hi?"}]
    assert exchanges_in(write(tmp_path / "b.jsonl", jobs)) == [[("Hi?", "")]]


def test_what_is_missing_is_empty_and_other_values_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"id": 1}])
    assert exchanges_in(file) == [[("a", "")], [("", "")], [("", "")]]
    write(file, [{"text": "a"}, {"text": 42}])
    with pytest.raises(
        UsageError, match=r"a.jsonl, entry 2, column 'text' is of type int, .* text$"
    ):
        exchanges_in(file)
    write(file, [{"messages": CHAT}, {"messages": [{"role": "user", "content": 42}]}])
    with pytest.raises(UsageError, match=r"entry 2, column 'messages' is of type int, not text"):
        exchanges_in(file)
    for wrong in ("hello", {"a": 1}, [{"content": "x"}], [7]):
        write(file, [{"messages": CHAT}, {"messages": []}, {"messages": wrong}])
        kind = (
            f"entry 3, column 'messages' holds no list of turns.* of type {type(wrong).__name__}$"
        )
        with pytest.raises(UsageError, match=kind):
            exchanges_in(file)
    write(file, [{"text": "a"}, {"text": "half \ud83d"}])
    with pytest.raises(UsageError, match="entry 2, column 'text' is not valid Unicode"):
        exchanges_in(file)


@pytest.mark.parametrize(
    ("rows", "choice", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "no column has a name .*--text_column NAME.* it has a, b"),
        ([{"Dear Sir, where is my order now": "x"}], {}, "no column has a name"),
        ([{"text": "x"}], {"text": "body"}, "has no column 'body', only text"),
        ([{"text": "x"}], {"messages": "text"}, "--messages text: .* holds no list of turns"),
        ([{"a": CHAT, "b": CHAT}], {}, "the columns a, b hold conversations; choose one with"),
        ([{"messages": turns("x", roles=("me",))}], {}, "the roles are me, and none is .*user"),
        ([[1]], {}, "entry 1 is neither a text nor an object"),
        ([message("a", None, "prompter", "x"), message("b", "z", "assistant", "y")], {},
         "entry 2: the message that it replies to does not stand before it"),
    ],
)  # fmt: skip
def test_what_cannot_be_recognised_is_explained(rows, choice, message, tmp_path):
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=message) as error:
        exchanges_in(file, Choice(**choice))
    assert "a.jsonl" in str(error.value)


def test_a_file_without_rows_has_no_form(tmp_path):
    for name, content in (("a.json", "[]"), ("a.csv", "text\n"), ("a.jsonl", "\n")):
        (tmp_path / name).write_text(content)
        assert recognise(tmp_path / name, Choice()) is None
