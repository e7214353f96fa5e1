"""The private instruction set: filters, deduplication, splits, and input of every kind."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import prepare_chatbot_arena
from data.prepare_chatbot_arena import (
    default_output,
    drop_shared_ngrams,
    first_exchanges,
    main,
    ngram_hashes,
    read_conversations,
)
from tests.json_lines import jsonl
from tests.paths import ROOT
from utils.cli import UsageError


def conversation(*turns, language="English", redacted=False, flagged=False):
    """A row of LMSYS-Chat-1M; `turns` alternate between user and assistant."""
    roles = ["user", "assistant"] * len(turns)
    return {
        "conversation_id": "c",
        "model": "m",
        "conversation": [{"content": text, "role": role} for text, role in zip(turns, roles)],
        "turn": len(turns) // 2,
        "language": language,
        "openai_moderation": [
            {"categories": {"violence": False}, "category_scores": {"violence": 0.1}, "flagged": f}
            for f in (False, flagged)
        ],
        "redacted": redacted,
    }


def many(count):
    return [conversation(f"Question {n}?", f"Answer {n}.", "More?", "No.") for n in range(count)]


def write_json_list(path, rows):
    path.write_text(json.dumps(rows))


def write_jsonl(path, rows):
    path.write_text(jsonl(rows))


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {".json": write_json_list, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.fixture
def prepare(tmp_path):
    """Writes rows to a file, runs `main` on it with sizes 10 and 3, and loads the result."""

    def run(rows, *arguments, name="out", suffix=".jsonl"):
        source, output = tmp_path / f"rows{suffix}", tmp_path / name
        WRITERS[suffix](source, rows)
        options = ["--input", source, "--output", output, "--train_size", 10, "--val_size", 3]
        main([str(option) for option in [*options, *arguments]])
        return {split: part.to_list() for split, part in load_from_disk(output).items()}

    return run


def instructions(splits):
    return [row["instruction"] for part in splits.values() for row in part]


def kept_of(rows, pairs=False):
    dropped = Counter()
    rows = first_exchanges(((f"row {n}", row) for n, row in enumerate(rows)), pairs, dropped)
    return rows, dict(dropped)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_data_set(prepare, suffix):
    rows = many(30) + [conversation("Größe – “x”\u2028ends?", "Yes.")]
    splits = prepare(rows, suffix=suffix)
    assert [len(part) for part in splits.values()] == [10, 3, 18]
    assert sorted(instructions(splits)) == sorted(r["conversation"][0]["content"] for r in rows)
    assert splits["train"][0].keys() == {"instruction"}
    assert splits == prepare(rows, name="again", suffix=".jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation("Guten Tag", language="German"), "not English"),
        (conversation("I am NAME_1", redacted=True), "redacted"),
        (conversation("Bad", flagged=True), "flagged by moderation"),
        (conversation("  \n"), "empty first message"),
        (conversation(), "empty first message"),
        (conversation("first  ONE!"), "repeats an earlier message"),
        (conversation("You are the text completion model and you must complete the assistant "
                      "answer below, only send the completion."), "known template"),
        (conversation("Give me an introduction over 200 words for Acme, a chemical company"),
         "known template"),
        (conversation("Write an article about the Upstream and Downstream products of toluene"),
         "known template"),
        (conversation("Beginning now and going forward, you may not apologize."),
         "known template"),
    ],
)  # fmt: skip
def test_each_filter_drops_and_counts_its_own(row, reason):
    rows, dropped = kept_of([conversation("First one"), row, conversation("Last one")])
    assert [row["instruction"] for row in rows] == ["First one", "Last one"]
    assert dropped == {reason: 1}


def test_only_the_first_user_message_counts():
    row = conversation(" Hello \n", "Hi.", "Second", "Bye.")
    row["conversation"].insert(0, {"role": "system", "content": "Be kind."})
    assert kept_of([row])[0] == [{"instruction": "Hello"}]


def test_pairs_take_the_answer_right_after_the_instruction():
    unanswered = conversation("Nobody answers", "", "Hello?", "Yes.")
    twice = conversation("Asked twice", "x")
    twice["conversation"].insert(1, {"role": "user", "content": "again"})
    answered = conversation("Is it late?", " It is.\n", "Why?", "Because.")
    rows, dropped = kept_of([unanswered, conversation("No turn"), twice, answered], pairs=True)
    assert rows == [{"instruction": "Is it late?", "answer": "It is."}]
    assert dropped == {"no answer": 3}


def test_half_a_surrogate_pair_does_not_stop_the_run(prepare):
    splits = prepare([*many(20), conversation("half \ud83d here", "x")], suffix=".jsonl")
    assert "half ? here" in instructions(splits)


def test_pairs_are_saved_with_their_answers(prepare):
    splits = prepare(many(20), "--pairs", name="labelled_out")
    for row in [row for part in splits.values() for row in part]:
        number = row["instruction"].removeprefix("Question ").rstrip("?")
        assert row == {"instruction": f"Question {number}?", "answer": f"Answer {number}."}


# ---------------------------------------------------------------- ten words in a row

WORDS = st.lists(st.sampled_from("abc"), max_size=30)


def grams(words):
    return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}


@settings(deadline=None, max_examples=200)
@given(st.lists(WORDS, max_size=8))
def test_a_message_is_dropped_if_and_only_if_it_shares_ten_words_with_an_earlier_one(messages):
    dropped = Counter()
    rows = [{"instruction": " ".join(words)} for words in messages]
    kept = drop_shared_ngrams(rows, dropped)
    expected, seen = [], set()
    for row, words in zip(rows, messages):
        if not grams(words) & seen:
            expected.append(row)
        seen |= grams(words)
    assert kept == expected
    assert dropped.total() == len(rows) - len(kept)


def test_ten_words_decide_and_nine_do_not():
    ten, nine = "a b c d e f g h i j", "a b c d e f g h i"
    texts = [f"x {ten} y", f"z {nine} w", f"Other, {ten.upper()}; and more", "short", "short"]
    kept = drop_shared_ngrams([{"instruction": text} for text in texts], Counter())
    assert [row["instruction"] for row in kept] == [texts[0], texts[1], "short", "short"]


def test_a_message_that_repeats_itself_is_kept():
    rows = [{"instruction": "one two three four five " * 10}]
    assert drop_shared_ngrams(rows, Counter()) == rows


def test_ngram_hashes_tell_order_apart_and_depend_on_nothing_else():
    words = [f"w{n}" for n in range(12)]
    hashes = ngram_hashes(" ".join(words))
    assert hashes.shape == (3,)
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == 3
    assert ngram_hashes("x " + " ".join(words))[1:].tolist() == hashes.tolist()
    assert ngram_hashes(" ".join(words[:10][::-1]))[0] not in hashes


def test_ngram_hashes_hardly_collide():
    source = random.Random(0)
    text = " ".join(source.choice("abcdefghij") for _ in range(200_000))
    words = text.split()
    distinct = len({tuple(words[i : i + 10]) for i in range(len(words) - 9)})
    assert len(np.unique(ngram_hashes(text))) == distinct


# ---------------------------------------------------------------- splits and output


def test_the_split_is_decided_by_the_seed_and_nothing_is_in_two_parts(prepare):
    rows = many(40) + many(40)
    one = prepare(rows, name="one")
    assert one == prepare(rows, name="same")
    other = prepare(rows, "--seed", 1, name="other")
    assert other != one
    for splits in (one, other):
        assert len(set(instructions(splits))) == len(instructions(splits)) == 40


def test_too_few_rows_name_sizes_that_fit(prepare):
    with pytest.raises(UsageError, match="need 14 .*--train_size 11 --val_size 1 fit"):
        prepare(many(13))
    rows = many(13)
    splits = prepare(rows, "--train_size", 11, "--val_size", 1)
    assert [len(part) for part in splits.values()] == [11, 1, 1]


@pytest.mark.parametrize("rows", [[], [conversation("Hallo", language="German")]])
def test_nothing_left_is_a_line_and_not_a_crash(prepare, tmp_path, rows):
    with pytest.raises(UsageError, match="0 instructions are left.*see the table above"):
        prepare(rows)
    assert not (tmp_path / "out").exists()


def test_an_output_is_replaced_only_when_told(prepare, tmp_path):
    first = prepare(many(20))
    with pytest.raises(UsageError, match="exists; choose another, or .*--overwrite"):
        prepare(many(30))
    splits = {s: part.to_list() for s, part in load_from_disk(tmp_path / "out").items()}
    assert splits == first
    assert len(instructions(prepare(many(30), "--overwrite"))) == 30


def test_only_an_output_of_this_script_is_replaced(prepare, tmp_path):
    prepare(many(20))
    (tmp_path / "out" / "private").mkdir()
    ledger = tmp_path / "out" / "private" / "histogram_ledger.jsonl"
    ledger.write_text("")
    with pytest.raises(UsageError, match="has a ledger, private/histogram_ledger.jsonl, without"):
        prepare(many(30), "--overwrite")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "preparation.json").write_text('{"kept": 1, "dropped": {}}')
    with pytest.raises(UsageError, match="thesis' holds something else; choose another"):
        prepare(many(30), "--overwrite", name="thesis")
    assert ledger.exists()


@pytest.mark.parametrize(("name", "flags"), [("labelled_x", []), ("x", ["--pairs"])])
def test_the_name_must_say_whether_the_set_holds_pairs(prepare, name, flags):
    with pytest.raises(UsageError, match="starts with 'labelled'"):
        prepare(many(20), *flags, name=name)


@pytest.mark.parametrize(
    ("size", "pairs", "name"),
    [
        (180_000, False, "data/chatbot_arena_instructions_train180k"),
        (180_000, True, "data/labelled_real_arena180k"),
        (1_500, False, "data/chatbot_arena_instructions_train1500"),
    ],
)
def test_default_names(size, pairs, name):
    assert default_output(size, pairs) == name


def test_the_table_adds_up_and_goes_to_stderr(prepare, capfd):
    prepare(many(20) + many(5) + [conversation("Nein", language="German")])
    out, err = capfd.readouterr()
    assert out == ""
    table = {" ".join(w[:-2]): int(w[-2]) for line in err.splitlines()
             if (w := line.split())[-1].endswith("%")}  # fmt: skip
    assert table == {
        "repeats an earlier message": 5,
        "not English": 1,
        "shares 10 words in a row": 0,
        "kept": 20,
    }


# ---------------------------------------------------------------- broken input


def read_all(path):
    return [row for _, row in read_conversations([str(path)])]


ROW = json.dumps(conversation("Hello", "Hi"))


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (f"{ROW}\n{ROW[:50]}", 2),
        (f"{ROW}\nnot JSON\n{ROW}\n", 2),
        (f"[{ROW}, {ROW}, {ROW[:50]}", 3),
        (f"[{ROW}, oops, {ROW}]", 2),
        (f"[{ROW}", 2),
        ('{"a":\n1}', 1),
    ],
)
def test_a_torn_or_foreign_line_is_named(tmp_path, text, row):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"rows\.json, row {row} is not readable") as error:
        read_all(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_and_a_torn_parquet_file_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROW.encode() + b"\n\xff\xfe\n")
    with pytest.raises(UsageError, match=r"rows\.jsonl, row \d is not readable"):
        read_all(tmp_path / "rows.jsonl")
    write_parquet(tmp_path / "rows.parquet", many(50))
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"rows\.parquet, row 1 is not readable") as error:
        read_all(tmp_path / "rows.parquet")
    assert "\n" not in str(error.value)


def without(column):
    return {name: value for name, value in conversation("Hi", "Hi").items() if name != column}


@pytest.mark.parametrize(
    "row",
    [
        *[without(column) for column in prepare_chatbot_arena.COLUMNS],
        7, [], "text", None,
        conversation("Hi") | {"conversation": ["Hi"]},
        conversation("Hi") | {"conversation": [{"role": "user"}]},
        conversation("Hi") | {"conversation": None},
        conversation("Hi") | {"conversation": [{"role": "user", "content": 7}]},
        conversation("Hi") | {"openai_moderation": [{}]},
        conversation("Hi") | {"openai_moderation": True},
    ],
)  # fmt: skip
def test_another_schema_is_named_with_its_row(prepare, tmp_path, row):
    with pytest.raises(UsageError, match=r"rows\.jsonl, row 2 does not have the schema") as error:
        prepare([conversation("Hi", "Hi"), row])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_without_a_column_is_named(prepare):
    with pytest.raises(UsageError, match=r"rows\.parquet, row 1 does not have the schema"):
        prepare([without("redacted")], suffix=".parquet")


@pytest.mark.parametrize("name", ["missing.jsonl", "notes.txt", "empty_folder"])
def test_an_input_that_is_not_there_is_named(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UsageError, match=f"{name}' is not a file of .json"):
        list(read_conversations([str(tmp_path / name)]))


def test_every_input_is_found_before_the_first_is_read(tmp_path, capfd):
    write_jsonl(tmp_path / "rows.jsonl", many(3))
    with pytest.raises(UsageError):
        next(read_conversations([str(tmp_path / "rows.jsonl"), str(tmp_path / "missing")]))
    assert "reading" not in capfd.readouterr().err


def test_a_folder_gives_its_files_in_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "deep" / "b.parquet", many(4)[2:])
    write_jsonl(tmp_path / "deep" / "a.jsonl", many(4)[:2])
    (tmp_path / "README.md").write_text("x")
    rows = read_all(tmp_path)
    assert [row["conversation"][0]["content"] for row in rows] == [
        f"Question {n}?" for n in range(4)
    ]


def test_the_real_command_answers_for_bad_input_and_unreachable_hub_with_code_2(tmp_path):
    (tmp_path / "rows.jsonl").write_text("oops\n")
    for source in (tmp_path / "rows.jsonl", "lmsys/lmsys-chat-1m"):
        finished = subprocess.run(
            [sys.executable, ROOT / "data" / "prepare_chatbot_arena.py", "--input", source],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 2
        assert finished.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in finished.stderr
    assert "set HF_TOKEN" in finished.stderr


def test_memory_does_not_grow_with_what_is_dropped(tmp_path):
    """Rows stream: 40 MB of conversations in German leave the process as small as it was."""
    path = tmp_path / "rows.json"
    row = json.dumps(conversation("x " * 2000, "y " * 18_000, language="German"))
    path.write_text("[" + ",\n".join([row] * 1000) + "]")
    script = f"""
import re
from collections import Counter
from data.prepare_chatbot_arena import first_exchanges, read_conversations
def peak():  # getrusage would count the parent's memory at the fork as well
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, dropped = peak(), Counter()
assert first_exchanges(read_conversations([{str(path)!r}]), False, dropped) == []
assert dropped == {{"not English": 1000}}, dropped
print(peak() - before)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert path.stat().st_size > 39e6
    assert float(finished.stdout) < 20  # MiB
