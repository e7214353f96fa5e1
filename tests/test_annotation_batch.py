"""The vendor's batch mode: request files, and results merged into the same records."""

import json
from pathlib import Path

import pytest

from query_gpt35_for_annotation import annotate, make_batch, read_batch
from query_gpt35_for_annotation.job import Job, instruction_id, read_records
from query_gpt35_for_annotation.make_batch import split_lines
from query_gpt35_for_annotation.spending import Price, Spending
from tests.annotation_server import Server, completion
from utils.cli import UsageError
from utils.files import read_jsonl

JOB = ["--instructions", "i.json", "--max_tokens", "50"]
OUT = Path("out")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder to work in, with instructions q0 to q9."""
    monkeypatch.chdir(tmp_path)
    Path("i.json").write_text(json.dumps([f"q{each}" for each in range(10)]))


def make(*arguments):
    """Make batch files; returns the names that stand in the folder, and the requests."""
    make_batch.main([*JOB, "--output", "out", *arguments])
    paths = sorted((OUT / "batch").iterdir())
    requests = [each for path in paths if path.suffix == ".jsonl" for each in read_jsonl(path)]
    return [path.name for path in paths], requests


def instruction_of(request):
    return request["body"]["messages"][-1]["content"]


def write_results(requests, name="results.jsonl", **changes):
    """Write what the vendor would, but other fields for the instructions in `changes`."""
    with open(name, "w") as file:
        for request in requests:
            instruction = instruction_of(request)
            response = {"status_code": 200, "body": completion(instruction)}
            line = {"custom_id": request["custom_id"], "response": response, "error": None}
            file.write(json.dumps(line | changes.get(instruction, {})) + "\n")


def read(*names):
    return read_batch.main(["--output", "out", "--results", *(names or ["results.jsonl"])])


def failed(status, **error):
    return {"response": {"status_code": status, "body": {"error": error}}}


def test_requests_have_the_form_that_batch_servers_read(capsys):
    names, requests = make()
    assert names == ["requests-00001.jsonl"]
    assert capsys.readouterr().out == "out/batch/requests-00001.jsonl\n"
    assert [instruction_of(request) for request in requests] == [f"q{each}" for each in range(10)]
    assert requests[3] == {
        "custom_id": instruction_id("q3"),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-3.5-turbo",
            "messages": [{"role": "user", "content": "q3"}],
            "temperature": 0.7,
            "top_p": 0.95,
            "max_tokens": 50,
        },
    }


def test_results_become_the_records_of_annotate_at_half_the_price():
    _, requests = make()
    write_results(reversed(requests))
    assert read() == 0
    with Server() as server:
        annotate.main([*JOB, "--output", "direct", "--base_url", server.url])
    batch, direct = read_records(OUT), read_records(Path("direct"))
    assert batch == {key: record | {"batch": True} for key, record in direct.items()}

    def cost(records):
        job = Job(OUT, "m", "", {"max_tokens": 50}, [])
        return Spending(job, Price(1, 3), None, list(records.values())).spent

    assert cost(batch) == pytest.approx(cost(direct) / 2)


def test_what_a_batch_may_answer_is_not_asked_until_its_results_are_read():
    make("--limit", "4")
    with Server() as server:
        command = [*JOB, "--output", "out", "--base_url", server.url]
        for ask in (lambda: annotate.main(command), make):
            with pytest.raises(UsageError, match="requests-00001.jsonl' waits for its results"):
                ask()
        assert server.requests == []
        write_results(read_jsonl(OUT / "batch" / "requests-00001.jsonl"))
        read()
        assert annotate.main(command) == 0
    assert len(server.requests) == 6
    assert {record["status"] for record in read_records(OUT).values()} == {"ok"}


def test_every_outcome_is_told_apart_and_what_failed_can_be_asked_again(capsys):
    _, requests = make()
    cut = {"response": {"status_code": 200, "body": completion("q1", finish_reason="length")}}
    empty = {"response": {"status_code": 200, "body": {"choices": []}}}
    write_results(
        requests,
        q1=cut,
        q2=empty,
        q3=failed(400, code="content_filter"),
        q4=failed(400, code="whatever"),
        q5=failed(500),
        q6={"response": None, "error": {"code": "batch_expired"}},
        q7={"response": "?", "error": "odd"},
    )
    assert read() == 1
    records = read_records(OUT)
    status = [records[instruction_id(f"q{each}")]["status"] for each in range(10)]
    assert status == ["ok", "truncated", "unanswered", "failed", *["unanswered"] * 4, "ok", "ok"]
    assert "5 unanswered" in capsys.readouterr().err
    # An answer of which nothing could be read was paid for all the same, and stays so.
    assert records[instruction_id("q2")]["unmetered_attempts"] == 1
    names, requests = make()
    assert names == ["requests-00001.read", "requests-00002.jsonl"]
    assert [instruction_of(request) for request in requests] == ["q2", "q4", "q5", "q6", "q7"]
    write_results(requests)
    assert read() == 0
    assert read_records(OUT)[instruction_id("q2")]["unmetered_attempts"] == 1


def test_results_in_parts_are_merged_once_and_strangers_are_counted(capsys):
    names, requests = make("--requests_per_file", "4")
    assert names == [f"requests-{number:05d}.jsonl" for number in (1, 2, 3)]
    write_results(requests[:6])
    assert read() == 1
    assert "4 requests have no result yet" in capsys.readouterr().err
    assert [path.suffix for path in sorted((OUT / "batch").iterdir())] == [
        ".read", ".jsonl", ".jsonl",
    ]  # fmt: skip
    write_results(requests[4:] + [requests[9] | {"custom_id": "stranger"}], "more.jsonl")
    assert read("results.jsonl", "more.jsonl") == 0
    said = capsys.readouterr().err
    assert "4 ok" in said
    assert "1 no request of this folder" in said
    assert len(list(read_jsonl(OUT / "answers.jsonl"))) == 10
    assert not list((OUT / "batch").glob("*.jsonl"))


def test_the_last_result_needs_no_newline_and_a_torn_one_is_named():
    _, requests = make()
    write_results(requests)
    text = Path("results.jsonl").read_text().rstrip("\n")
    for content, line in ((text[:-9], 10), (text + "\n\n[1]\n", 11)):
        Path("results.jsonl").write_text(content)
        with pytest.raises(UsageError, match=f"results.jsonl.*line {line}|more than objects"):
            read()
    Path("results.jsonl").write_text("\ufeff" + text)
    assert read() == 0
    assert len(read_records(OUT)) == 10


def test_files_keep_to_the_limits_on_lines_and_bytes():
    lines = [b"x" * size for size in (5, 5, 5, 30, 1, 1, 1, 1)]
    parts = list(split_lines(lines, most_lines=3, most_bytes=12))
    assert [list(map(len, part)) for part in parts] == [[5, 5], [5], [30], [1, 1, 1], [1]]


def test_unusable_arguments_are_explained():
    with pytest.raises(UsageError, match="'out' has no manifest.json"):
        read("i.json")
    make()
    with pytest.raises(UsageError, match="'nowhere' is not a file"):
        read("nowhere")
