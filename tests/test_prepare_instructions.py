"""From files of one's own to what training reads."""

import csv
import gzip
import json
import os
import random
import shlex
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from data.prepare_instructions import Preparation, language_code, main, split_shares
from tests.json_lines import jsonl
from tests.paths import ROOT
from tests.test_rows import SAME, TEXTS, WRONG
from tests.test_rows import write as write_content
from utils import secure_random
from utils.cli import UsageError
from utils.texts.data_sets import count_train_examples, load_splits
from utils.texts.units import read_units

ROWS = 60


def question(n):
    return f"Question {n}?"


def chat(n, keys=("role", "content"), roles=("user", "assistant")):
    said = zip(roles, (question(n), f"Answer {n}."))
    return [dict(zip(keys, turn)) for turn in said]


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "reply"])
        writer.writerows([n, question(n), f"Answer {n}."] for n in range(ROWS))


def write_messages(path):
    path.write_text(jsonl({"messages": chat(n)} for n in range(ROWS)))


def write_sharegpt(path):
    rows = [
        {"id": "a", "conversations": chat(n, ("from", "value"), ("human", "gpt"))}
        for n in range(ROWS)
    ]
    path.write_text(json.dumps(rows, indent=1))


def write_parquet(path):
    rows = {
        "id": range(ROWS),
        "user_id": [n // 3 for n in range(ROWS)],
        "text": map(question, range(ROWS)),
        "ts": [1.5] * ROWS,
    }
    columns = {name: list(values) for name, values in rows.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_folder_of_texts(path):
    (path / "deeper").mkdir(parents=True)
    for n in range(ROWS):
        folder = path / "deeper" if n % 2 else path
        (folder / f"{n}.txt").write_text(question(n) + "\n", encoding="utf-8-sig")
    (path / ".hidden.txt").write_text("hidden")
    (path / "picture.png").write_bytes(b"")


def write_packed(path):
    path.write_bytes(gzip.compress(jsonl({"text": question(n)} for n in range(ROWS)).encode()))


def write_saved(path):
    table = Dataset.from_dict({"prompt": [question(n) for n in range(ROWS)]})
    DatasetDict(train_sft=table, test_sft=table.select([0])).save_to_disk(path)


def write_hub_layout(path):
    (path / "data").mkdir(parents=True)
    write_parquet(path / "data" / "train-00000-of-00001.parquet")
    (path / "data" / "test-00000-of-00001.jsonl").write_text('{"text": "test"}\n')
    (path / "README.md").write_text("")


def write_lines(path):
    path.write_text("".join(question(n) + "\r\n" for n in range(ROWS)))


# What writes them, flags, whether they have answers, and what of the output is shown.
INPUTS = {
    "a.csv": (write_csv, ["--answer_column", "reply"], True, "instructions from 'question'"),
    "a.jsonl": (write_messages, [], True, "from the column 'messages'"),
    "a.json": (write_sharegpt, [], True, "conversations of ShareGPT"),
    "a.parquet": (write_parquet, [], False, "units: 'user_id' seems to say whose a row is"),
    "texts": (write_folder_of_texts, [], False, "texts: 60 files"),
    "a.jsonl.gz": (write_packed, [], False, "instructions from 'text'"),
    "saved": (write_saved, ["--input_split", "train_sft"], False, "not test_sft (--input_split)"),
    "hub": (write_hub_layout, [], False, "reading the split 'train', not test"),
    "a.txt": (write_lines, [], False, "texts"),
}


def rows_of(output: Path) -> dict[str, list[dict]]:
    """The rows of every split that was written."""
    return {
        name: [json.loads(line) for line in open(file, encoding="utf-8", newline="\n")]
        for name in ("train", "val", "test")
        if (file := output / f"{name}.jsonl").exists()
    }


@pytest.fixture
def prepare(tmp_path):
    """Runs the script on a path, or on rows, and gives the rows of the splits."""

    def run(source, *flags, name="mine"):
        if isinstance(source, list):
            (tmp_path / "rows.jsonl").write_text(jsonl(source))
            source = tmp_path / "rows.jsonl"
        output = tmp_path / name
        main(["--input", str(source), "--output", str(output), *map(str, flags)])
        return rows_of(output)

    return run


def together(splits):
    return [row for rows in splits.values() for row in rows]


@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_input_becomes_what_training_reads(name, prepare, tmp_path, capsys):
    write, flags, has_answers, shown = INPUTS[name]
    write(tmp_path / name)
    output = "labelled_mine" if has_answers else "mine"
    splits = prepare(tmp_path / name, *flags, "--split", "train=0.5,val=0.3,test=0.2", name=output)
    said = capsys.readouterr().err
    assert shown in said
    assert list(splits) == ["train", "val", "test"]
    found = {row["instruction"]: row.get("answer") for row in together(splits)}
    answers = {question(n): f"Answer {n}." if has_answers else None for n in range(ROWS)}
    assert found == answers
    assert len(together(splits)) == ROWS
    path = str(tmp_path / output)
    loaded = load_splits(path)
    assert count_train_examples(path) == len(loaded["train"]) == len(splits["train"])
    assert loaded["train"][:]["instruction"] == [row["instruction"] for row in splits["train"]]
    assert len(loaded["val"]) == len(splits["val"])


@pytest.mark.parametrize("name", SAME)
def test_every_file_that_training_reads_gives_the_same_texts(name, prepare, tmp_path):
    write_content(tmp_path / name, SAME[name])
    splits = prepare(tmp_path / name, "--split", "train=1")
    assert splits == {"train": [{"instruction": text} for text in TEXTS if text]}


@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"null.jsonl"}))
def test_every_file_that_training_refuses_is_refused_in_the_same_words(name, prepare, tmp_path):
    content, message = WRONG[name]
    write_content(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as error:
        prepare(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_row_without_a_text_is_dropped_and_not_refused(prepare, tmp_path):
    write_content(tmp_path / "null.jsonl", WRONG["null.jsonl"][0])
    splits = prepare(tmp_path / "null.jsonl", "--split", "train=1")
    assert splits == {"train": [{"instruction": "good"}] * 7}


def test_a_lone_text_file_and_a_folder_may_be_read_the_other_way(prepare, tmp_path):
    write_lines(tmp_path / "a.txt")
    whole = prepare(tmp_path / "a.txt", "--txt_rows", "file", "--split", "train=1")
    assert whole == {"train": [{"instruction": "\n".join(map(question, range(ROWS)))}]}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\n\ntwo\n")
    lines = prepare(tmp_path / "texts", "--txt_rows", "line", "--split", "train=1", name="lines")
    assert [row["instruction"] for row in lines["train"]] == ["one", "two"]


def test_what_is_kept_and_dropped_is_counted_and_called_private(prepare, capsys):
    rows = [
        {"text": "a\u202e" + "b" * 300, "answer": "x", "user": "u", "lang": "en-US"},
        {"text": " ", "answer": "x", "user": "u", "lang": "English"},
        {"text": None, "answer": "x", "user": "u", "lang": "en"},
        {"text": "c", "answer": "", "user": "u", "lang": "en"},
        {"text": "d", "answer": "x", "user": "", "lang": "en"},
        {"text": "e", "answer": "x", "user": "u", "lang": "German"},
        {"text": "f", "answer": "x", "user": "u"},
    ]
    splits = prepare(rows, "--language", "English", "--split", "train=1", name="labelled_mine")
    assert [row["answer"] for row in together(splits)] == ["x"]
    out, err = capsys.readouterr()
    assert out == ""
    table = err[err.index("private, not for sharing:") :].splitlines()
    counts = {" ".join(w[:-2]): int(w[-2]) for line in table if (w := line.split())[-1:] and
              w[-1].endswith("%")}  # fmt: skip
    assert counts == {"kept": 1, "empty": 2, "no answer": 1, "no owner": 1, "not English": 2}
    (shown,) = [line for line in table if line.startswith("  instruction: ")]
    assert shown == "  instruction: a\ufffd" + "b" * 158 + "..."
    assert "--unit_column user --max_rows_per_unit K --prompt_style vicuna" in table[-1]


def test_system_messages_and_turns_make_rows_of_one_conversation(prepare, tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "S"}, *chat(n), *chat(n + 100)]}
        for n in range(ROWS)
    ]
    splits = prepare(rows, "--turn", "all", "--split", "train=0.5,val=0.5")
    found = together(splits)
    assert len(found) == 2 * ROWS
    for part in splits.values():
        assert set(Counter(row["conversation"] for row in part).values()) == {2}
    assert len({row["conversation"] for row in found}) == ROWS
    assert len(read_units(str(tmp_path / "mine"), "conversation")) == len(splits["train"])


def test_the_conversation_may_be_asked_for(prepare):
    """It is a column that has this name, or what is made of a conversation."""
    flags = ("--turn", "all", "--unit_column", "conversation", "--split", "train=1")
    words = [chat(n) + chat(n + 100) for n in range(9)]
    for number, name in enumerate(("messages", "conversation")):
        rows = [{name: said, "user_id": "u"} for said in words]
        found = prepare(rows, *flags, name=f"derived{number}")["train"]
        assert [*Counter(row["conversation"] for row in found).values()] == [2] * 9
    rows = [{"messages": said, "conversation": n // 3} for n, said in enumerate(words)]
    found = prepare(rows, *flags, name="named")["train"]
    assert Counter(row["conversation"] for row in found) == {"0": 6, "1": 6, "2": 6}
    with pytest.raises(
        UsageError, match="--unit_column conversation: .* no such column, only text"
    ):
        prepare(ONE, "--unit_column", "conversation", name="texts")


@pytest.mark.parametrize("turn", ["first", "all"])
def test_a_later_file_that_says_whose_its_rows_are_is_not_read_past(turn, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    files[0].write_text(jsonl({"messages": chat(n)} for n in range(3)))
    files[1].write_text(jsonl({"messages": chat(n), "user_id": n} for n in range(3)))
    flags = ["--input", *map(str, files), "--output", str(tmp_path / "mine"), "--turn", turn,
             "--split", "train=1"]  # fmt: skip
    unit, meant = {"first": ("none", "rows"), "all": ("conversation", "conversations")}[turn]
    with pytest.raises(
        UsageError,
        match=f"b.jsonl has the column 'user_id', .*--unit_column user_id, or say with "
        f"--unit_column {unit} that {meant} are meant",
    ):
        main(flags)
    main([*flags, "--unit_column", unit])
    assert len(rows_of(tmp_path / "mine")["train"]) == 6


def of_owners(owners, rows=3):
    return [
        {"text": f"{owner} says {n}", "user_id": owner} for n in range(rows) for owner in owners
    ]


def test_no_owner_is_in_two_splits_and_no_row_moves_another_owner(prepare):
    owners = [f"user {n}" for n in range(80)]
    split = ("--split", "train=0.4,val=0.3,test=0.3")
    splits = prepare(of_owners(owners), *split)
    of_split = [{row["user_id"] for row in part} for part in splits.values()]
    assert [bool(part) for part in of_split] == [True] * 3
    assert sum(map(len, of_split)) == len(set.union(*of_split)) == 80
    neighbour = prepare(of_owners(owners[1:]), *split, name="neighbour")
    expected = {
        name: [row for row in part if row["user_id"] != owners[0]] for name, part in splits.items()
    }
    assert neighbour == expected


def test_equal_instructions_without_owners_are_in_one_split(prepare):
    splits = prepare([{"text": f"say {n % 20}"} for n in range(80)], "--split", "train=0.5,val=0.5")
    parts = [{row["instruction"] for row in part} for part in splits.values()]
    assert len(parts) == 2
    assert not set.intersection(*parts)


def test_the_cap_keeps_rows_of_an_owner_by_a_secret_draw(prepare, capsys, monkeypatch):
    owners = [f"user {n}" for n in range(900)]
    drawn = []
    monkeypatch.setattr(secure_random.SecureRandom, "insecure_fixed", None)
    for name in ("one", "two"):
        random.seed(0)
        np.random.seed(0)
        splits = prepare(of_owners(owners), "--max_rows_per_unit", 1, name=name)
        drawn.append({row["user_id"]: row["instruction"] for row in together(splits)})
        assert len(together(splits)) == 900
        places = Counter(row["instruction"][-1] for row in together(splits))
        # 300 each, of deviation 14: by the first rows or the last it would be 900 and 0.
        assert all(220 < places[place] < 380 for place in "012")
    assert drawn[0] != drawn[1]
    assert "above the cap of a unit        1,800" in capsys.readouterr().err


def test_rows_without_an_owner_stay_when_told_and_are_not_capped(prepare, tmp_path):
    rows = [{"text": f"say {n}", "user_id": None if n % 2 else n // 20} for n in range(40)]
    flags = ("--max_rows_per_unit", 2, "--unowned_rows_are_units", "--split", "train=1")
    splits = prepare(rows, *flags)
    assert Counter(row["user_id"] for row in splits["train"]) == {None: 20, "0": 2, "1": 2}
    units = read_units(str(tmp_path / "mine"), "user_id", unowned_rows_are_units=True)
    assert len(set(units)) == 22


def test_owners_may_be_lists_or_numbers_and_are_written_as_texts(prepare, capsys):
    rows = [{"text": "a", "who": [7, 8]}, {"text": "b", "who": "8"}, {"text": "c", "who": 8.0}]
    flags = ("--unit_column", "who", "--split", "train=1")
    with pytest.raises(UsageError, match="entry 1: --unit_column who has a list of 2 owners"):
        prepare(rows, *flags)
    splits = prepare(rows, *flags, "--owner", "last")
    assert [row["who"] for row in splits["train"]] == ["8"] * 3
    # Training says then for whom of them its guarantee is not.
    assert "--unit_column who --max_rows_per_unit K --owner last" in capsys.readouterr().err


def test_the_output_is_for_its_owner_alone_from_the_start(prepare, tmp_path, monkeypatch):
    modes, read = [], Preparation.read
    monkeypatch.setattr(
        Preparation,
        "read",
        lambda self, files: modes.append(os.stat(self.folder).st_mode) or read(self, files),
    )
    before = os.umask(0)
    try:
        prepare([{"text": "a"}], "--split", "train=1")
    finally:
        os.umask(before)
    modes.append(os.stat(tmp_path / "mine").st_mode)
    assert [oct(stat.S_IMODE(mode)) for mode in modes] == ["0o700"] * 2
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "train.jsonl", "preparation.json",
    }  # fmt: skip


def test_nothing_is_left_outside_the_output_and_no_large_library_is_loaded(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    home = tmp_path / "home"
    home.mkdir()
    script = """
import sys
from data.prepare_instructions import main
assert not {"torch", "datasets", "pyarrow", "transformers"} & sys.modules.keys()
main(sys.argv[1:])
assert not {"torch", "datasets", "transformers"} & sys.modules.keys()
"""
    flags = ["--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "mine")]
    folders = {name: str(home) for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, env=os.environ | folders, check=True
    )
    assert list(home.rglob("*")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", "home", "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_what_did_not_end_leaves_what_was_there(error, prepare, tmp_path, monkeypatch):
    first = prepare([{"text": "a"}], "--split", "train=1")
    with pytest.raises(UsageError, match="exists; choose another, or replace it with --overwrite"):
        prepare([{"text": "b"}])

    def stop(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "finish", stop)
        with pytest.raises(error):
            prepare([{"text": "b"}], "--overwrite")
    assert rows_of(tmp_path / "mine") == first
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "mine"}
    prepare([{"text": "b"}], "--overwrite", "--split", "train=1")
    assert rows_of(tmp_path / "mine") == {"train": [{"instruction": "b"}]}


def test_only_a_prepared_folder_that_is_not_read_may_be_replaced(prepare, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else; choose another"):
        prepare([{"text": "a"}], "--overwrite")
    prepare([{"text": "a"}], "--split", "train=1", name="other")
    with pytest.raises(UsageError, match="would replace .*train.jsonl', which is read"):
        prepare(tmp_path / "other", "--overwrite", name="other")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    # Of `topics.assign`, and of this script with a ledger.
    (tmp_path / "mine" / "preparation.json").write_text('{"command": "", "splits": {}}')
    with pytest.raises(UsageError, match="holds something else; choose another"):
        prepare([{"text": "a"}], "--overwrite")
    (tmp_path / "other" / "ledger").mkdir()
    (tmp_path / "other" / "ledger" / "histogram_ledger.jsonl").write_text("")
    with pytest.raises(UsageError, match="has a ledger, ledger/histogram_ledger.jsonl, without wh"):
        prepare([{"text": "a"}], "--overwrite", name="other")
    assert (tmp_path / "other" / "ledger" / "histogram_ledger.jsonl").exists()


ONE = [{"text": "a", "id": 1}]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (ONE, ["--text_column", "body"], "no column 'body', only text, id"),
        (ONE, ["--unit_column", "user"], "--unit_column user: .* only text, id"),
        (ONE, ["--unit_column", "none", "--max_rows_per_unit", "2"], "name the column with --un"),
        (ONE, ["--max_rows_per_unit", "2"], "--max_rows_per_unit needs to know whose a row is"),
        (ONE, ["--language", "en"], "--language en: .* no column language or lang"),
        (ONE, ["--messages", "id"], "--messages id: .* no list of turns"),
        (ONE, ["--messages", "id", "--text_column", "text"], "two sources of texts; give one"),
        ([{"messages": chat(1)}], ["--answer_column", "messages"], "are for columns of texts, and"),
        (
            ONE,
            ["--turn", "all"],
            "--turn all is for conversations, and .*rows.jsonl has a column",
        ),
        (ONE, ["--input_split", "train"], "--input_split train: .*rows.jsonl' has no splits"),
        ([{"text": ""}], [], "no row is left to train on"),
        ([{"text": 42}], [], "entry 1, column 'text' is of type int, not text$"),
        ([{"text": "a", "answer": "b"}], ["--unit_column", "answer"], "another column of this"),
        ([{"text": "a", "user": True}], [], "--unit_column user is of type bool, neither"),
        ([{"text": "a", "user": "\ud83d"}], [], "--unit_column user is not valid Unicode"),
    ],
)
def test_wrong_rows_and_flags_are_explained_and_nothing_is_left(
    rows, flags, message, prepare, tmp_path
):
    with pytest.raises(UsageError, match=message) as error:
        prepare(rows, *flags)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_next_command_can_be_pasted_whatever_the_names_are(prepare, capsys):
    rows = [{"instruction": "a", "a person": "p"}]
    prepare(rows, "--unit_column=a person", name="my; data")
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("next: ")]
    words = shlex.split(line)
    assert Path(words[words.index("--dataset_name") + 1]).name == "my; data"
    assert words[words.index("--unit_column") + 1] == "a person"


def test_pairs_need_answers(prepare):
    with pytest.raises(UsageError, match="takes pairs from a name .* --answer_column, or choose"):
        prepare(ONE, name="labelled_mine")


@pytest.mark.parametrize(
    "name", ["none.csv", "a.docx", "a.xlsx", "empty", "saved", "pipe.json", "x" * 5000]
)
def test_inputs_that_are_not_there_or_not_known_are_explained(name, prepare, tmp_path):
    (tmp_path / "a.docx").write_bytes(b"")
    (tmp_path / "a.xlsx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    write_saved(tmp_path / "saved")
    messages = {
        "none.csv": "none.csv' does not exist",
        "a.docx": "a form that is not known; take .json, .jsonl, .csv",
        "a.xlsx": "save it as CSV in UTF-8",
        "empty": "a folder without a file that is known",
        "pipe.json": "is a pipe or a device; save what it gives in a file",
        "saved": "has the splits test_sft, train_sft; take one with --input_split NAME",
    }
    with pytest.raises(UsageError, match=messages.get(name, "does not exist")):
        prepare(tmp_path / name)


def test_a_name_of_the_hub_is_downloaded(prepare, tmp_path, monkeypatch):
    write_hub_layout(tmp_path / "snapshot")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **_: str(tmp_path / "snapshot") if name == "org/name" else None,
    )
    assert len(together(prepare("org/name"))) == ROWS


@pytest.mark.parametrize(
    "text", ["train=0.5", "train=0.5,val=0.6", "val=1", "train=x", "dev=1", "train=1.5,val=-0.5"]
)
def test_shares_that_do_not_add_up_are_refused(text, prepare, capsys):
    with pytest.raises(SystemExit) as error:
        prepare(ONE, "--split", text)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_shares_are_kept_in_the_mean():
    shares = split_shares("train=0.95, val=0.02,test=0.03")
    assert shares == {"train": 0.95, "val": 0.02, "test": 0.03}
    preparation = Preparation.__new__(Preparation)
    preparation.settings = type("Settings", (), {"split": shares})
    counts = Counter(preparation.split_of(f"user {n}") for n in range(10_000))
    # Deviations of 22, 14 and 17.
    assert abs(counts["val"] - 200) < 70
    assert abs(counts["test"] - 300) < 85


def test_languages_have_names_and_codes():
    assert {language_code(name) for name in ("English", "en", "EN-us", "en_GB")} == {"en"}
    assert language_code("Klingon") == "klingon"
    assert language_code(None) != "en"


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "a.csv").write_text("id;body\n1;x\n")
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare_instructions", "--input", str(tmp_path / "a.csv"),
         "--output", str(tmp_path / "mine")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "say which does with --text_column NAME" in line
    assert line.endswith("it has id, body")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_rows_fit_in_three_gib(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "prompt"])
        for n in range(1_000_000):
            writer.writerow([f"user-{n // 3}", f"Tell me about {n}. " + "word " * 40])
    script = """
import resource, sys
from data.prepare_instructions import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    flags = ["--input", tmp_path / "a.csv", "--output", tmp_path / "mine", "--max_rows_per_unit", 2]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert int(done.stdout) < 3 * 2**20  # KiB
    assert count_train_examples(str(tmp_path / "mine")) > 600_000
