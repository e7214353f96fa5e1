"""Whole annotation runs: faults, kills, costs, and what is left on the disk."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from query_gpt35_for_annotation import annotate
from query_gpt35_for_annotation.job import Job, instruction_id, read_outcomes, read_records
from query_gpt35_for_annotation.spending import Price, Spending
from tests.annotation_server import KEY, MinuteLimit, Reply, Server, answer, completion, error
from tests.json_lines import jsonl
from tests.paths import ROOT
from utils.cli import UsageError
from utils.command_line.parser import read_flags
from utils.files import JsonlAppender, hashes_of, read_jsonl
from utils.folders import locked

pytestmark = pytest.mark.usefixtures("key")


def arguments(folder, server, number, **flags):
    """The command line for `number` instructions q0, q1, ... and answers of 50 tokens."""
    file = folder / "instructions.json"
    file.write_text(json.dumps([f"q{each}" for each in range(number)]))
    flags = {"max_tokens": 50, "concurrency": 8} | flags
    words = ["--instructions", file, "--output", folder / "out", "--base_url", server.url]
    return [*map(str, words), *(f"--{name}={value}" for name, value in flags.items())]


def run(folder, server, number, **flags):
    """Run in this process; returns the exit code and the records."""
    code = annotate.main(arguments(folder, server, number, **flags))
    return code, read_records(folder / "out")


def outcomes(folder):
    """How many outcomes each instruction has in the file, which keeps every line ever written."""
    lines = read_jsonl(folder / "out" / "answers.jsonl")
    return Counter(line["instruction_sha256"] for line in lines if line["status"] != "unanswered")


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ faults


def misbehaving(limit, share=0.2):
    """A server with a rate limit, where a share of the requests that it lets in goes wrong."""
    faults = [
        lambda text: error(500, "oops"),
        lambda text: error(503, "busy", {"retry-after": "0.2"}),
        lambda text: error(429, "slow down"),
        lambda text: error(429, "slow down", {"retry-after": "0.2"}),
        lambda text: Reply(completion(text), wait=20),
        lambda text: Reply(completion(text), drip=0.05),
        lambda text: Reply(completion(text), cut=60),
        lambda text: Reply(b'{"choices": [{"mess'),
        lambda text: Reply({"choices": []}),
    ]
    odds = random.Random(0)

    def behave(request):
        if not limit.take():
            return error(429, "rate limit", {"retry-after": "0.1"} if odds.random() < 0.5 else {})
        if odds.random() < share:
            return odds.choice(faults)(request.instruction)
        return Reply(completion(request.instruction), wait=0.05)

    return behave


def check_all_answered(folder, server, code, records, number):
    assert code == 0
    assert len(records) == number
    for each in range(number):
        record = records[instruction_id(f"q{each}")]
        assert (record["status"], record["answer"]) == ("ok", f"answer to q{each}")
        assert record["instruction"] == f"q{each}"
    assert set(outcomes(folder).values()) == {1}
    assert len(server.answered) == number
    assert set(server.answered.values()) == {1}


def test_every_instruction_is_answered_once_against_a_fifth_of_faults(tmp_path, quick):
    with Server(misbehaving(MinuteLimit(12_000, burst=2))) as server:
        code, records = run(tmp_path, server, 300, timeout=1, concurrency=32)
    check_all_answered(tmp_path, server, code, records, 300)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"requests_per_minute": 3000}, {}], ids=["told", "untold"])
def test_5000_instructions_against_a_fifth_of_faults_at_the_speed_of_the_limits(
    tmp_path, flags, capsys
):
    with Server(misbehaving(MinuteLimit(3000, burst=2))) as server:
        code, records = run(tmp_path, server, 5000, timeout=2, concurrency=64, **flags)
    check_all_answered(tmp_path, server, code, records, 5000)
    minutes = (server.times[-1] - server.times[0]) / 60
    speed = 5000 / minutes / 3000
    with capsys.disabled():
        print(f"\n{flags or 'no flag'}: {len(server.requests):,} requests, {minutes * 60:.0f} s, ")
        print(f"{speed:.3f} of the limit are answers, {speed / 0.8:.3f} of what faults leave of it")
    assert speed / 0.8 > 0.8


def test_a_storm_of_refusals_is_waited_out(tmp_path, quick):
    begun = time.monotonic()

    def behave(request):
        storm = time.monotonic() - begun < 2
        return error(429, "no") if storm else answer(request)

    with Server(behave) as server:
        code, records = run(tmp_path, server, 100)
    check_all_answered(tmp_path, server, code, records, 100)


def test_an_outage_stops_the_run_and_keeps_what_it_has(tmp_path, quick, capsys):
    def behave(request):
        return answer(request) if request.number < 30 else error(500, "down")

    with Server(behave) as server:
        code, records = run(tmp_path, server, 500, max_retries=1, concurrency=6)
        assert code == 1
        assert 8 <= len(server.requests) - 30 <= 6 * 2 * 2
        assert sum(record["status"] == "ok" for record in records.values()) == 30
        assert "6 instructions in a row ran out of --max_retries: 500" in capsys.readouterr().err
        server.behave = answer
        code, records = run(tmp_path, server, 500)
    check_all_answered(tmp_path, server, code, records, 500)


@pytest.mark.parametrize(
    "reply",
    [
        error(401, f"Incorrect API key provided: {KEY}"),
        error(403, "no"),
        error(404, "gone", code="model_not_found"),
        error(429, "no money", code="insufficient_quota"),
        error(400, "nothing pleases me"),
    ],
)
def test_hopeless_errors_end_the_run_early_and_a_mended_run_goes_on(reply, tmp_path, capsys):
    with Server(lambda request: answer(request) if request.number < 5 else reply) as server:
        code, records = run(tmp_path, server, 200, concurrency=1, limit=5)
        assert code == 0
        code, records = run(tmp_path, server, 200)
        assert code == 1
        # A refusal that might concern a single instruction is not believed at once.
        assert len(server.requests) - 5 <= (115 if reply.status in (400, 403) else 8)
        text = capsys.readouterr().err
        assert "stopped early: " in text
        assert KEY not in text
        assert KEY.encode() not in everything_written(tmp_path)
        assert sum(record["unmetered_attempts"] for record in records.values()) == 0
        server.behave = answer
        code, records = run(tmp_path, server, 200)
    check_all_answered(tmp_path, server, code, records, 200)


def test_a_server_that_refuses_from_the_first_request_marks_nothing_as_failed(tmp_path):
    """A wrong flag must not write off 180,000 instructions."""
    too_long = error(400, "maximum context length is 64", code="context_length_exceeded")
    with Server(lambda request: too_long) as server:
        code, records = run(tmp_path, server, 200)
        assert code == 1
        assert len(server.requests) <= 10 + 8
        assert {record["status"] for record in records.values()} == {"unanswered"}
        server.behave = answer
        code, records = run(tmp_path, server, 200, max_tokens=49)
    check_all_answered(tmp_path, server, code, records, 200)


def test_refused_and_cut_answers_are_marked(tmp_path, capsys):
    replies = {
        "q1": Reply(completion("q1", finish_reason="length")),
        "q2": Reply(completion("q2", refusal="I cannot", content=None)),
        "q3": Reply(completion("q3", content="")),
        "q4": error(400, "filtered", code="content_filter"),
    }
    with Server(lambda request: replies.get(request.instruction, answer(request))) as server:
        code, records = run(tmp_path, server, 6)
    assert code == 0
    status = [records[instruction_id(f"q{each}")]["status"] for each in range(6)]
    assert status == ["ok", "truncated", "refused", "empty", "failed", "ok"]
    text = capsys.readouterr().err
    assert "6 of 6 done" in text
    assert re.search("this run: 2 ok, .*1 truncated", text)


def test_a_full_disk_stops_the_requests(tmp_path, monkeypatch, capsys):
    append, failures = JsonlAppender.append, []

    def full(self, records):
        assert not failures, "written after a line that may be torn"
        if len(server.requests) >= 20:
            failures.append(records)
            raise OSError(28, "No space left on device")
        append(self, records)

    monkeypatch.setattr(JsonlAppender, "append", full)
    with Server() as server:
        code, records = run(tmp_path, server, 200, concurrency=4)
        assert code == 1
        assert len(server.requests) <= 20 + 4
        assert "answers cannot be written: [Errno 28]" in capsys.readouterr().err
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        # What is on record covers all that was paid.
        paid = sum(server.paid.values())
        known = sum(
            record["unmetered_attempts"] + (record["status"] == "ok") for record in records.values()
        )
        assert known >= paid
        code, records = run(tmp_path, server, 200, concurrency=4)
    assert code == 0
    assert len(records) == 200


def test_a_defect_in_one_worker_keeps_the_answers_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(annotate.Client, "_explain_status", lambda *_: 1 / 0)

    def behave(request):
        if request.number == 3:
            return error(500, "x")
        return Reply(completion(request.instruction), wait=0.3)

    with Server(behave) as server, pytest.raises(ZeroDivisionError):
        run(tmp_path, server, 50, concurrency=6)
    assert sum(outcomes(tmp_path).values()) == sum(server.answered.values()) == 5


# ------------------------------------------------------------------ kills


def start(folder, server, number, **flags):
    """Start the command in a process of its own, with the noisiest logs."""
    command = [sys.executable, "-m", "query_gpt35_for_annotation.annotate"]
    return subprocess.Popen(
        [*command, *arguments(folder, server, number, **flags)],
        cwd=ROOT, env=os.environ | {"OPENAI_LOG": "debug"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_requests(server, number):
    deadline = time.monotonic() + 60
    while len(server.requests) < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_9_at_any_moment_loses_nothing_and_pays_for_nothing_twice(tmp_path):
    odds, number, concurrency, kills = random.Random(1), 120, 4, 3

    def behave(request):
        lost = odds.random() < 0.1
        return Reply(completion(request.instruction), wait=0.05, cut=40 if lost else None)

    with Server(behave) as server:
        for kill in range(kills):
            process = start(tmp_path, server, number, concurrency=concurrency)
            wait_for_requests(server, len(server.requests) + odds.randint(1, 40))
            time.sleep(odds.random() * 0.05)
            process.kill()
            process.communicate()
            # A kill in the middle of a write, which a small record makes unlikely.
            with open(tmp_path / "out" / "answers.jsonl", "ab") as file:
                file.write(b'{"id": "to' * (kill % 2))
            before = outcomes(tmp_path)
        code, records = run(tmp_path, server, number, concurrency=concurrency)
    assert code == 0
    assert len(records) == number
    assert set(outcomes(tmp_path).values()) == {1}
    assert before.keys() <= outcomes(tmp_path).keys()
    # An answer that arrived just before a kill may not have been on the disk yet.
    assert sum(server.answered.values()) - number <= kills * concurrency
    # Whatever was paid without an answer on the disk is known, though each run but one was killed.
    unmetered = {record["instruction"]: record["unmetered_attempts"] for record in records.values()}
    assert all(server.paid[text] - 1 <= unmetered[text] for text in unmetered)
    assert sum(unmetered.values()) <= sum(server.paid.values()) - number + kills * concurrency


def test_ctrl_c_waits_for_what_is_in_flight(tmp_path):
    with Server(lambda request: Reply(completion(request.instruction), wait=0.5)) as server:
        process = start(tmp_path, server, 100)
        wait_for_requests(server, 20)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "the same command goes on from here" in output
        assert sum(outcomes(tmp_path).values()) == len(server.requests) < 100
        assert KEY not in output
        code, records = run(tmp_path, server, 100, concurrency=100)
    check_all_answered(tmp_path, server, code, records, 100)
    assert KEY.encode() not in everything_written(tmp_path)


def test_a_closed_terminal_waits_for_what_is_in_flight(tmp_path):
    with Server(lambda request: Reply(completion(request.instruction), wait=0.5)) as server:
        process = start(tmp_path, server, 100)
        wait_for_requests(server, 20)
        # What it says has no reader any more.
        process.stdout.close()
        for number in (signal.SIGHUP, signal.SIGTERM):
            process.send_signal(number)
        assert process.wait(30) == 130
        assert sum(outcomes(tmp_path).values()) == len(server.requests) < 100
        code, records = run(tmp_path, server, 100, concurrency=100)
    check_all_answered(tmp_path, server, code, records, 100)


def test_a_process_that_was_paused_reads_the_answers_that_came_meanwhile(tmp_path):
    with Server(lambda request: Reply(completion(request.instruction), wait=0.5)) as server:
        process = start(tmp_path, server, 16, timeout=1.5)
        wait_for_requests(server, 8)
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        records = read_records(tmp_path / "out")
    assert len(server.requests) == 16
    check_all_answered(tmp_path, server, 0, records, 16)
    assert {record["unmetered_attempts"] for record in records.values()} == {0}


@pytest.mark.parametrize(
    ("overrides", "example"),
    [
        ({"content": ""}, "such as empty"),
        ({"finish_reason": "length"}, "such as truncated \\('answer to"),
        (
            {"content": "<think>hm", "finish_reason": "length"},
            "used up all tokens to reason; give a higher --max_tokens",
        ),
    ],
)
def test_a_model_that_gives_nothing_usable_is_stopped_before_it_is_paid_more(
    tmp_path, capsys, overrides, example
):
    with Server(lambda request: Reply(completion("q", **overrides))) as server:
        code, _ = run(tmp_path, server, 500, concurrency=4)
        assert code == 1
        assert 20 <= len(server.requests) <= 23
        assert re.search(
            f"the first 20 answers are all unusable, .*{example}", capsys.readouterr().err
        )


def test_one_usable_answer_among_the_first_is_enough(tmp_path):
    def behave(request):
        usable = request.number == 10
        return answer(request) if usable else Reply(completion("q", content=""))

    with Server(behave) as server:
        code, records = run(tmp_path, server, 60, concurrency=1)
    assert (code, len(records)) == (0, 60)


@pytest.mark.parametrize("kept", [False, True])
def test_reasoning_is_left_out_of_answers_counted_and_kept_on_request(tmp_path, capsys, kept):
    def behave(request):
        text = "<think>hm</think>fine" if request.number % 2 else "fine"
        return Reply(completion("q", content=text))

    with Server(behave) as server:
        code = annotate.main(arguments(tmp_path, server, 10) + ["--keep_reasoning"] * kept)
    records = read_records(tmp_path / "out").values()
    assert (code, {record["answer"] for record in records}) == (0, {"fine"})
    assert sum(record.get("reasoning") == "hm" for record in records) == 5 * kept
    assert sum("reasoning" in record for record in records) == 5 * kept
    assert (
        "5 answers came with reasoning, which was "
        + ("kept apart" if kept else "left out (--keep_reasoning")
        in capsys.readouterr().err
    )


def test_a_second_ctrl_c_does_not_wait_and_what_it_leaves_is_on_record(tmp_path):
    with Server(lambda request: Reply(completion(request.instruction), wait=60)) as server:
        process = start(tmp_path, server, 100)
        wait_for_requests(server, 8)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in output
    records = read_records(tmp_path / "out").values()
    assert [record["unmetered_attempts"] for record in records] == [1] * 8


# ------------------------------------------------------------------ costs

# A dollar a token of answer: 20 for each answer, 50 in the worst case.
DOLLAR = {"input_price": 0, "output_price": 1e6}


def cost_on_record(folder):
    job = Job(folder / "out", "m", "", {"max_tokens": 50}, [])
    return Spending(job, Price(0, 1e6), None, list(read_records(folder / "out").values())).spent


def test_max_cost_is_never_passed_whatever_gets_lost_or_killed(tmp_path, quick, capsys):
    odds = random.Random(2)

    def behave(request):
        lost = odds.random() < 0.2
        return Reply(completion(request.instruction), wait=0.02, cut=30 if lost else None)

    with Server(behave) as server:
        process = start(tmp_path, server, 500, max_cost=2000, **DOLLAR)
        wait_for_requests(server, 30)
        process.kill()
        process.communicate()
        code, _ = run(tmp_path, server, 500, max_cost=2000, **DOLLAR)
        assert code == 1
        assert "might pass --max_cost; raise it to go on" in capsys.readouterr().err
        paid = 20 * sum(server.paid.values())
        assert paid <= cost_on_record(tmp_path) <= 2000
        # It was used up to where another worst case would not fit.
        assert cost_on_record(tmp_path) > 2000 - 50
        code, _ = run(tmp_path, server, 500, max_cost=2000, **DOLLAR)
        assert code == 1
        assert 20 * sum(server.paid.values()) == paid
        code, _ = run(tmp_path, server, 500, max_cost=1e6, **DOLLAR)
    assert code == 0


def test_max_cost_counts_what_is_in_flight(tmp_path):
    """Five in flight may cost 250 together, so that no sixth is sent before one is here."""
    with Server(lambda request: Reply(completion(request.instruction), wait=0.1)) as server:
        code, _ = run(tmp_path, server, 100, max_cost=299, concurrency=50, **DOLLAR)
    assert code == 1
    assert server.most_in_flight == 5
    assert sum(server.paid.values()) == 13  # 12 are 240, and 13 are 260: another might cost 310


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "unheard-of"}, "--max_cost 5 needs a price: .*--input_price"),
        ({"drop_parameters": "max_tokens"}, "--max_cost 5 needs a bound"),
    ],
)
def test_a_cost_bound_that_cannot_be_kept_is_refused(flags, message, tmp_path):
    with Server() as server, pytest.raises(UsageError, match=message):
        run(tmp_path, server, 5, max_cost=5, **flags)
    assert server.requests == []


def test_a_dry_run_estimates_and_sends_nothing(tmp_path, capsys):
    with Server() as server:
        command = [*arguments(tmp_path, server, 1000), "--dry_run"]
        assert annotate.main(command) == 0
        first = capsys.readouterr().out
        assert server.requests == []
        assert not (tmp_path / "out").exists()
        # 1,000 times 9 prompt tokens at $0.5 and 50 answer tokens at $1.5 a million.
        assert "1,000 instructions to ask, about 9,000 prompt tokens" in first
        assert "at most, if each answer takes 50: 50,000 answer tokens, $0.08" in first
        run(tmp_path, server, 1000, limit=100)
        capsys.readouterr()
        # Of a hundred answers an estimate holds what tells them apart, and no text.
        outcomes = read_outcomes(tmp_path / "out").values()
        assert (len(outcomes), len(set(map(id, outcomes)))) == (100, 1)
        annotate.main(command)
    likely = capsys.readouterr().out
    assert "900 instructions to ask" in likely
    assert "likely, at the mean of 20 of the 100 answers so far: 18,000 answer tokens" in likely


# ------------------------------------------------------------------ folders


def test_a_second_process_on_a_folder_is_refused(tmp_path):
    with Server(lambda request: Reply(completion(request.instruction), wait=0.5)) as server:
        process = start(tmp_path, server, 100)
        wait_for_requests(server, 1)
        with pytest.raises(UsageError, match="in use by another process"):
            run(tmp_path, server, 100)
        process.kill()
        process.communicate()
        with locked(tmp_path / "out", ""):
            pass


def test_a_folder_keeps_to_its_settings_and_takes_more_instructions(tmp_path, capsys):
    with Server() as server:
        run(tmp_path, server, 10)
        with pytest.raises(UsageError, match="temperature 0.7, not 0.5; .* name another --output"):
            run(tmp_path, server, 10, temperature=0.5)
        with pytest.raises(UsageError, match="top_p 0.95, not None; .* name another --output"):
            run(tmp_path, server, 10, drop_parameters="top_p")
        with pytest.raises(
            UsageError, match="model gpt-3.5-turbo, not m; .* name another --output"
        ):
            run(tmp_path, server, 10, model="m")
        with pytest.raises(UsageError, match="records of 3 instructions that are not in"):
            run(tmp_path, server, 7)
        assert len(server.requests) == 10
        run(tmp_path, server, 15)
    with Server() as moved:
        run(tmp_path, moved, 16)
    assert f"earlier answers came from --base_url {server.url}" in capsys.readouterr().err
    assert (len(server.requests), len(moved.requests)) == (15, 1)
    assert len(read_records(tmp_path / "out")) == 16


def test_answers_of_older_versions_are_known(tmp_path):
    with Server() as server:
        run(tmp_path, server, 4)
        file = tmp_path / "out" / "answers.jsonl"
        old = [{"id": line.pop("instruction_sha256")} | line for line in read_jsonl(file)]
        file.write_text(jsonl(old))
        code, records = run(tmp_path, server, 6)
        assert (code, len(server.requests)) == (0, 6)
    assert records.keys() == {instruction_id(f"q{each}") for each in range(6)}
    assert all(key == record["instruction_sha256"] for key, record in records.items())


def test_the_manifest_says_who_was_asked_and_how(tmp_path):
    flags = {"drop_parameters": "top_p", "max_tokens_parameter": "max_completion_tokens"}
    with Server() as server:
        _, records = run(tmp_path, server, 1, **flags)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    decoding = {"temperature": 0.7, "max_completion_tokens": 50}
    assert manifest == {
        "model": "gpt-3.5-turbo", "base_url": server.url, "decoding": decoding,
        "inputs_sha256": hashes_of([tmp_path / "instructions.json"]),
    }  # fmt: skip
    message = [{"role": "user", "content": "q0"}]
    assert server.requests[0].body == {"model": "gpt-3.5-turbo", "messages": message} | decoding
    (record,) = records.values()
    assert record == {
        "instruction_sha256": hashlib.sha256(b"q0").hexdigest(), "instruction": "q0",
        "status": "ok",
        "answer": "answer to q0", "model": "fake-0301", "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 20}, "unmetered_attempts": 0,
        "error": None,
    }  # fmt: skip


def test_defaults_are_the_published_ones(tmp_path):
    args = read_flags(annotate.Settings, "", ["--instructions", "x", "--output", "y"])
    assert (args.model, args.temperature, args.top_p, args.max_tokens) == (
        "gpt-3.5-turbo", 0.7, 0.95, 1024,
    )  # fmt: skip
    assert args.base_url == "https://api.openai.com/v1"


def test_a_base_url_with_a_secret_is_refused_and_not_shown(tmp_path):
    (tmp_path / "i.txt").write_text("q\n")
    for url in ("https://user:hush@x/v1", "https://x/v1?key=hush"):
        with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
            annotate.main(
                ["--instructions", str(tmp_path / "i.txt"), "--output", "o", "--base_url", url]
            )
        assert "hush" not in str(caught.value)
