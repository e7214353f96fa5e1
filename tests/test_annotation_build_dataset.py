"""Answers to a data set that training takes."""

import json

import pytest
from datasets import DatasetDict, load_from_disk

import generate_train_command
from query_gpt35_for_annotation import build_dataset
from query_gpt35_for_annotation.client import answer_record
from query_gpt35_for_annotation.job import VENDOR_URL
from tests.training import run_process
from utils.cli import UsageError
from utils.files import JsonlAppender, write_json
from utils.texts.data_sets import count_train_examples, load_splits

LEFT_OUT = ("truncated", "refused", "empty", "failed", "unanswered")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to work in, with 100 answers, five left-overs and a torn line."""
    monkeypatch.chdir(tmp_path)
    write_answers("answers", range(100))
    return tmp_path


def write_answers(folder, numbers):
    records = [answer_record(f"q{i}", "ok", 0, answer=f"Antwort {i} 😀") for i in numbers]
    records += [answer_record(status, status, 0, answer="half") for status in LEFT_OUT]
    # What was put on record before a request was sent; the outcome replaces it.
    early = [answer_record(f"q{i}", "unanswered", 1) for i in numbers]
    with JsonlAppender(f"{folder}/answers.jsonl") as file:
        file.append(early + records)
    with open(f"{folder}/answers.jsonl", "a") as file:
        file.write('{"id": "torn')


def build(*arguments):
    build_dataset.main(["--answers", "answers", "--output", "data/labelled_x", *arguments])
    return load_from_disk("data/labelled_x")


def test_usable_answers_become_three_splits_and_the_rest_is_counted(project, capsys):
    data = build()
    assert isinstance(data, DatasetDict)
    assert {name: len(part) for name, part in data.items()} == {"train": 90, "val": 5, "test": 5}
    pairs = [(row["instruction"], row["answer"]) for part in data.values() for row in part]
    assert sorted(pairs) == sorted((f"q{i}", f"Antwort {i} 😀") for i in range(100))
    assert all(part.column_names == ["instruction", "answer"] for part in data.values())
    said = capsys.readouterr().err
    assert (
        "left out of 105 instructions: "
        "1 empty, 1 failed, 1 refused, 1 truncated, 1 unanswered" in said
    )
    assert "wrote data/labelled_x: train 90, val 5, test 5" in said


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_answers(project):
    def splits():
        return {name: part[:] for name, part in load_from_disk("data/labelled_x").items()}

    def again(*arguments):
        (project / "data/labelled_x").rename(project / f"old{len(list(project.iterdir()))}")
        build(*arguments)
        return splits()

    build("--seed", "3")
    first = splits()
    assert again("--seed", "3") == first
    (project / "answers").rename(project / "earlier")
    write_answers("answers", reversed(range(100)))
    assert again("--seed", "3") == first
    assert again("--seed", "4") != first


def test_sizes_are_numbers_or_shares(project):
    data = build("--val_size", "7", "--test_size", "0.101")
    assert {name: len(part) for name, part in data.items()} == {"train": 82, "val": 7, "test": 11}


def test_the_data_set_goes_straight_into_type_c(project, capsys):
    build()
    assert count_train_examples("labelled_x") == 90
    assert {name: len(rows) for name, rows in load_splits("labelled_x").items()} == {
        "train": 90, "val": 5,
    }  # fmt: skip
    code = generate_train_command.main(
        ["--dataset_name", "labelled_x", "--model_name", "m", "--job_sess", "j", "--eps", "-1",
         "--prompt_style", "vicuna"]
    )  # fmt: skip
    assert code == 0
    assert "--dataset_name labelled_x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "data/x"], "'data/x' must .* such as 'data/labelled_x'"),
        (["--answers", "nowhere"], "'nowhere' has no answers.jsonl"),
        (["--val_size", "60", "--test_size", "0.4"], "take 100 of 100 usable answers"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message, project):
    with pytest.raises(UsageError, match=message):
        build(*arguments)
    assert not (project / "data").exists()


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "nan", "half"])
def test_sizes_that_make_no_sense_are_refused(size, project, capsys):
    with pytest.raises(SystemExit) as caught:
        build("--val_size", size)
    assert caught.value.code == 2
    assert "--val_size" in capsys.readouterr().err


def test_nothing_is_overwritten(project):
    build()
    before = json.loads((project / "data/labelled_x/train/dataset_info.json").read_text())
    with pytest.raises(UsageError, match="'data/labelled_x' exists"):
        build("--seed", "9")
    assert json.loads((project / "data/labelled_x/train/dataset_info.json").read_text()) == before


MEASURED = """
import resource, sys
from query_gpt35_for_annotation import annotate, build_dataset
{"build": build_dataset, "dry": annotate}[sys.argv.pop(1)].main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_a_million_rows_take_less_than_a_gigabyte(tmp_path):
    """Of 200 characters each: 1.1 GB of answers."""
    (tmp_path / "answers").mkdir()
    with (
        open(tmp_path / "answers" / "answers.jsonl", "w") as answers,
        open(tmp_path / "instructions.jsonl", "w") as instructions,
    ):
        for number in range(1_000_000):
            text = f"{number} ask ".ljust(200, "x")
            usage = {"prompt_tokens": 50, "completion_tokens": 100}
            record = answer_record(text, "ok", 0, answer=f"{number} say ".ljust(200), usage=usage)
            answers.write(json.dumps(record) + "\n")
            instructions.write(json.dumps({"instruction": text}) + "\n")

    def megabytes(*arguments):
        finished = run_process("-c", MEASURED, *map(str, arguments), timeout=900)
        assert finished.returncode == 0, finished.stderr
        return int(finished.stdout.splitlines()[-1])

    output = tmp_path / "labelled_x"
    assert megabytes("build", "--answers", tmp_path / "answers", "--output", output) < 1024
    assert len(load_from_disk(output)["train"]) == 900_000
    instructions = ("--instructions", tmp_path / "instructions.jsonl")
    assert megabytes("dry", *instructions, "--output", tmp_path / "new", "--dry_run") < 1024
    decoding = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024}
    manifest = {"model": "gpt-3.5-turbo", "base_url": VENDOR_URL, "decoding": decoding}
    write_json(tmp_path / "answers" / "manifest.json", manifest)
    assert megabytes("dry", *instructions, "--output", tmp_path / "answers", "--dry_run") < 1024
