"""Answers from sampling folders and from AlpacaEval's JSON, and from the first to the second."""

import json

import pytest

from evaluation.alpaca_eval import main, read_answers
from tests.json_lines import jsonl
from utils.cli import UsageError
from utils.files import JsonlAppender


def objects(*pairs, **rest):
    return [{"instruction": question, "output": answer} | rest for question, answer in pairs]


def sampling_folder(folder, samples):
    """A folder as `inference.py` leaves it: (id, prompt, text, finish_reason) over two shards."""
    for rank in range(2):
        with JsonlAppender(folder / f"shard-{rank}.jsonl") as shard:
            shard.append(
                {"id": id, "prompt": prompt, "text": text, "num_tokens": 3, "finish_reason": reason}
                for id, prompt, text, reason in samples
                if id % 2 == rank
            )
    (folder / "manifest.json").write_text("{}")
    return folder


def test_a_sampling_folder_becomes_alpaca_evals_file_in_order_of_ids(tmp_path, capsys):
    questions = ["größer?\n\nJa", "b", "c", " d "]
    reasons = ["stop", "length", "prompt_too_long", "stop"]
    samples = [(id, questions[id], f"answer {id}" * (id != 2), reasons[id]) for id in (3, 1, 2, 0)]
    folder = sampling_folder(tmp_path / "my_job", samples)
    output = tmp_path / "answers.json"
    main(["--answers", str(folder), "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == [
        {"instruction": text, "output": answer, "generator": "my_job"}
        for text, answer in zip(questions, ["answer 0", "answer 1", "", "answer 3"])
    ]
    assert "1 of them are cut" in capsys.readouterr().err
    there = read_answers(folder)
    assert (there.name, there.num_cut) == ("my_job", 1)
    again = read_answers(output)
    assert (again.name, again.texts, again.num_cut) == (there.name, there.texts, 0)
    with pytest.raises(UsageError, match="exists; name another"):
        main(["--answers", str(folder), "--output", str(output)])


def test_a_file_is_named_after_its_generator_or_after_itself(tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps(objects(("a", "x"), ("b", ""), generator="gpt")))
    answers = read_answers(file)
    assert (answers.name, answers.texts) == ("gpt", {"a": "x", "b": ""})
    file.write_text("\ufeff" + json.dumps(objects(("a", "x"))), encoding="utf-8")
    assert read_answers(file).name == "some"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction"', "as JSON"),
        ("", "as JSON"),
        (b"\xff\xfe[]", "UTF-16"),
        ({"instruction": "a", "output": "b"}, "must hold a list"),
        (["a"], "not a JSON list of objects"),
        ([], "no answer with a word"),
        (objects(("a", " "), ("b", "")), "no answer with a word"),
        (objects(("a", "x"), ("b", None)), "object 2 lacks an instruction, an answer"),
        ([{"instruction": "a", "answer": "x"}], "object 1 lacks"),
        (objects(("a", "x"), generator=["m"]), "object 1 lacks"),
        (objects((" \n", "x")), "object 1 has a blank instruction"),
        (objects(("a", "x"), ("b\nc", "y"), ("b\nc", "z")), r"object 3 answers .* 'b\\nc'"),
        (objects(("a", "\ud800")), "object 1 is not valid Unicode"),
        (objects(("a", "x"), generator="m") + objects(("b", "y")), "2 gen.*'m' and 'some'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "some.json"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as error:
        read_answers(file)
    assert "\n" not in str(error.value)


def test_a_bad_folder_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_answers(tmp_path / "none")
    with pytest.raises(UsageError, match="no answer with a word in it; answers are a folder of"):
        read_answers(tmp_path)
    shard = tmp_path / "shard-0.jsonl"
    shard.write_text('{"prompt": "a", "text": "x"}\n')
    with pytest.raises(UsageError, match="shard-0.jsonl, line 1 lacks the id of a sample"):
        read_answers(tmp_path)
    shard.write_text(jsonl({"id": id, "prompt": "a", "text": "x"} for id in range(2)))
    with pytest.raises(UsageError, match="shard-0.jsonl, line 2 answers an instruction"):
        read_answers(tmp_path)
