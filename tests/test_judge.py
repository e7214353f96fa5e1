"""Whole judging runs against a scripted judge: figures, interruptions, folders, privacy."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from evaluation import judge
from query_gpt35_for_annotation.job import read_records
from tests import annotation_server
from tests.annotation_server import KEY, Reply, Server, completion, error
from tests.paths import ROOT
from tests.test_alpaca_eval import sampling_folder
from utils.cli import UsageError
from utils.files import read_jsonl

pytestmark = pytest.mark.usefixtures("key")


def better(first, second):
    """The verdict of a fair judge, to whom a digit in an answer says how good that is."""
    quality = [int("0" + "".join(filter(str.isdigit, text))) for text in (first, second)]
    return "tie" if quality[0] == quality[1] else "AB"[quality[0] < quality[1]]


def longer(first, second):
    return "tie" if len(first) == len(second) else "AB"[len(first) < len(second)]


def write_sets(folder, ours, theirs):
    """Two files with answers to instructions q0, q1, ..."""
    for name, texts in (("ours", ours), ("theirs", theirs)):
        rows = [
            {"instruction": f"q{number}", "output": text, "generator": f"model_{name}"}
            for number, text in enumerate(texts)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def arguments(folder, server, *words, public=True, **flags):
    words += ("--public",) if public else ()
    paths = {name: folder / f"{name}.json" for name in ("ours", "theirs")}
    flags = paths | {"output": folder / "out", "base_url": server.url, "concurrency": 8} | flags
    return [*(f"--{name}={value}" for name, value in flags.items()), *words]


def run(folder, server, *words, **flags):
    return judge.main(arguments(folder, server, *words, **flags))


def result(folder):
    """The result, and its scores by name; figures of ours where there are two."""
    found = json.loads((folder / "judge.json").read_text())
    return found, {score["name"]: score for score in reversed(found["scores"])}


def values(folder):
    return {name: score["value"] for name, score in result(folder)[1].items()}


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ figures


def test_a_fair_judge_gives_wins_losses_and_ties(tmp_path, capsys):
    write_sets(tmp_path, list("9999991155"), list("1111119955"))
    with Server(annotation_server.judge(better)) as server:
        assert run(tmp_path, server) == 0
    found, scores = result(tmp_path / "out")
    assert {name: score["value"] for name, score in scores.items()} == pytest.approx(
        {
            "win rate": 0.7, "pairs with a tie": 0.2, "pairs with contrary verdicts": 0,
            "first position preferred, ties as half": 0.5, "characters an answer": 1,
            "pairs with the longer answer": 0,
        }
    )  # fmt: skip
    # Ten pairs with the deviation 0.4 have a standard error of 0.127.
    assert (scores["win rate"]["low"], scores["win rate"]["high"]) == pytest.approx(
        (0.7 - 1.96 * 0.127, 0.7 + 1.96 * 0.127), abs=0.05
    )
    assert {score["n"] for score in found["scores"]} == {10}
    none = scores["pairs with contrary verdicts"]
    assert (none["low"], none["high"]) == (0, pytest.approx(1 - 0.025 ** (1 / 10)))
    assert scores["win rate"]["subject"] == "ours: model_ours"
    assert (found["tool"], found["private"], found["settings"]["model"]) == (
        "judge", False, "gpt-4o-mini",
    )  # fmt: skip
    assert found["settings"]["prompt"] == judge.PROMPT
    notes = " ".join(found["notes"])
    assert "10 pairs were judged in both orders by fake-0301; 0 of 20 replies hold no" in notes
    printed = capsys.readouterr()
    assert "win rate" in printed.out
    assert notes in printed.out.replace("\n", " ")
    # Nothing in the request leaves the verdict to chance.
    bodies = [request.body for request in server.requests]
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in bodies} == {
        (0, 1, 16)
    }
    assert KEY not in printed.out + printed.err
    assert KEY.encode() not in everything_written(tmp_path)


def test_a_judge_that_prefers_a_position_lets_nobody_win(tmp_path):
    write_sets(tmp_path, list("999999"), list("111111"))
    for verdict, position in (("A", 1.0), ("B", 0.0), ("tie", 0.5)):
        with Server(annotation_server.judge(lambda *_: verdict)) as server:  # noqa: B023
            run(tmp_path, server, output=tmp_path / verdict)
        found = values(tmp_path / verdict)
        assert found["win rate"] == 0.5
        assert found["first position preferred, ties as half"] == position
        assert found["pairs with contrary verdicts"] == (verdict != "tie")
        assert found["pairs with a tie"] == (verdict == "tie")


def test_a_judge_that_prefers_length_wins_nothing_at_equal_length(tmp_path):
    lengths = [(10 + 7 * number % 41, 22 - number % 9) for number in range(60)]
    write_sets(tmp_path, *(["x" * pair[side] for pair in lengths] for side in range(2)))
    with Server(annotation_server.judge(longer)) as server:
        run(tmp_path, server)
    _, scores = result(tmp_path / "out")
    ours = sum(longer("x" * a, "x" * b) == "A" for a, b in lengths)
    ties = sum(a == b for a, b in lengths)
    assert scores["win rate"]["value"] == pytest.approx((ours + ties / 2) / 60)
    assert scores["win rate"]["low"] > 0.6
    assert scores["length-controlled win rate"]["value"] == pytest.approx(0.5, abs=0.1)
    low, high = (scores["length-controlled win rate"][end] for end in ("low", "high"))
    assert low < 0.5 < high
    longer_share = sum(a > b for a, b in lengths) / 60
    assert scores["pairs with the longer answer"]["value"] == pytest.approx(longer_share)
    assert scores["characters an answer"]["value"] == pytest.approx(
        sum(pair[0] for pair in lengths) / 60
    )


def test_a_judge_that_tosses_a_coin_is_seen_to(tmp_path):
    write_sets(tmp_path, [f"o{n}" for n in range(150)], [f"t{n}" for n in range(150)])

    def coin(first, second):
        return "AB"[hashlib.sha256(f"{first} {second}".encode()).digest()[0] % 2]

    with Server(annotation_server.judge(coin)) as server:
        run(tmp_path, server)
    found = values(tmp_path / "out")
    assert found["pairs with contrary verdicts"] == pytest.approx(0.5, abs=0.15)
    assert found["win rate"] == pytest.approx(0.5, abs=0.1)
    assert found["first position preferred, ties as half"] == pytest.approx(0.5, abs=0.1)


def test_replies_without_a_verdict_are_counted_and_never_win(tmp_path):
    write_sets(tmp_path, ["9"] * 8, [*"111111", "10", "2"])
    replies = {
        "1": Reply(completion("", content="A and B are good")),
        "2": Reply(completion("", content="A", finish_reason="length")),
        "3": Reply(completion("", content="")),
        "4": error(400, "filtered", code="content_filter"),
        "5": Reply(completion("", content="A", refusal="no")),
    }

    def behave(request):
        number = request.instruction.split("<instruction>\nq")[1][0]
        ours_first = "<answer_A>\n9" in request.instruction
        fair = annotation_server.judge(better)(request)
        return replies.get(number, fair) if ours_first else fair

    with Server(behave) as server:
        assert run(tmp_path, server) == 0
    found, scores = result(tmp_path / "out")
    assert scores["win rate"]["value"] == pytest.approx(2 / 3)
    assert "3 pairs were judged in both orders by" in found["notes"][0]
    assert "5 of 16 replies hold no verdict, which left out 5 pairs more" in found["notes"][0]


def test_a_judge_that_never_gives_a_verdict_gives_no_result(tmp_path):
    write_sets(tmp_path, ["9", "9"], ["1", "1"])
    for reply in ("I like both", ""):
        behave = annotation_server.judge(lambda *_: reply)  # noqa: B023
        message = f"no pair has two verdicts: gpt-4o-mini says '{reply}'"
        with Server(behave) as server, pytest.raises(UsageError, match=message):
            run(tmp_path, server, output=tmp_path / f"out{len(reply)}")
    assert not list(tmp_path.rglob("judge.json"))


def test_a_judge_whose_first_verdicts_cannot_be_read_is_paid_no_more(tmp_path, capsys):
    write_sets(tmp_path, ["9"] * 50, ["1"] * 50)
    behave = annotation_server.judge(lambda *_: "I like both")
    with Server(behave) as server:
        assert run(tmp_path, server, concurrency=4) == 1
        assert 20 <= len(server.requests) <= 23
    said = capsys.readouterr().err
    assert "the first 20 answers are all unusable, such as ok ('I like both')" in said


# ------------------------------------------------------------------ sets


def test_sampling_folders_are_matched_by_instruction(tmp_path):
    """As README has it; sets in another order, with what only one of them answers."""
    ours = [
        (0, "a", "9", "stop"),
        (1, "two\n\nlines", "9", "length"),
        (2, "only ours", "9", "stop"),
    ]
    theirs = [(0, "two\n\nlines", "1", "stop"), (1, "a", "", "stop"), (2, "theirs", "1", "stop")]
    flags = {
        "ours": sampling_folder(tmp_path / "answers", ours),
        "theirs": sampling_folder(tmp_path / "base_answers", theirs),
    }
    with Server(annotation_server.judge(better)) as server:
        assert run(tmp_path, server, **flags) == 0
    assert Counter(request.instruction for request in server.requests) == Counter(
        judge.PROMPT.format(instruction=instruction, first=first, second=second)
        for instruction, *pair in (("a", "9", ""), ("two\n\nlines", "9", "1"))
        for first, second in (pair, pair[::-1])
    )
    found, scores = result(tmp_path / "out")
    assert scores["win rate"]["value"] == 1
    assert scores["win rate"]["subject"] == "ours: answers"
    notes = "\n".join(found["notes"])
    assert "Instructions answered in --ours only, and left out: 1, such as 'only ours'." in notes
    assert "Instructions answered in --theirs only, and left out: 1, such as 'theirs'." in notes
    assert "Answers of --ours that are cut at the length limit, judged as they are: 1." in notes
    assert "Answers of --theirs that are empty, judged as they are: 1." in notes


def test_sets_without_a_common_instruction_are_refused(tmp_path):
    write_sets(tmp_path, ["x"], ["y"])
    rows = [{"instruction": "other", "output": "y"}]
    (tmp_path / "theirs.json").write_text(json.dumps(rows))
    with Server() as server, pytest.raises(UsageError, match="no instruction .*'q0'.*'other'"):
        run(tmp_path, server)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    write_sets(tmp_path, ["9"], ["1"])
    with (
        Server() as server,
        pytest.raises(UsageError, match="is a file or lies in one; name another --output"),
    ):
        run(tmp_path, server, output=tmp_path / "ours.json")


def test_a_set_against_itself_is_asked_once_a_pair_and_wins_half(tmp_path):
    write_sets(tmp_path, list("123"), list("123"))
    with Server(annotation_server.judge(lambda *_: "A")) as server:
        run(tmp_path, server)
    assert len(server.requests) == 3
    found = values(tmp_path / "out")
    assert found["win rate"] == 0.5
    assert "length-controlled win rate" not in found


# ------------------------------------------------------------------ interruptions and cost


def test_kill_9_and_ctrl_c_lose_nothing_and_pay_for_nothing_twice(tmp_path):
    write_sets(tmp_path, ["9"] * 150, ["1"] * 150)
    concurrency = 3

    def behave(request):
        reply = annotation_server.judge(better)(request)
        reply.wait = 0.05
        return reply

    with Server(behave) as server:
        command = arguments(tmp_path, server, concurrency=concurrency)
        for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
            process = subprocess.Popen(
                [sys.executable, "-m", "evaluation.judge", *command],
                cwd=ROOT, env=os.environ | {"OPENAI_LOG": "debug"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            before, deadline = len(server.requests), time.monotonic() + 60
            while len(server.requests) < before + 10:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            output, _ = process.communicate(timeout=30)
            assert process.returncode == code
            assert KEY not in output
            assert not list(tmp_path.rglob("judge.json"))
        assert len(server.requests) < 300
        assert run(tmp_path, server, concurrency=32) == 0
        # Only what was in flight at the kill may have been asked again.
        assert 300 <= len(server.requests) <= 300 + concurrency
        with pytest.raises(UsageError, match="judge.json exists; use another --output"):
            judge.main(command)
        assert len(server.requests) <= 300 + concurrency
    lines = read_jsonl(tmp_path / "out" / "judgements" / "answers.jsonl")
    outcomes = Counter(line["instruction_sha256"] for line in lines if line["status"] == "ok")
    assert len(outcomes) == 300
    assert set(outcomes.values()) == {1}
    assert values(tmp_path / "out")["win rate"] == 1


def test_a_bound_on_cost_or_requests_ends_without_a_result_and_the_rest_follows(tmp_path, capsys):
    write_sets(tmp_path, ["9"] * 10, ["1"] * 10)
    dollar = {"input_price": 0, "output_price": 1e6}  # 20 for each reply, and at most
    with Server(annotation_server.judge(better)) as server:
        assert run(tmp_path, server, max_tokens=20, limit=6) == 0
        assert "no result yet" in capsys.readouterr().err
        assert len(server.requests) == 6
        assert run(tmp_path, server, max_tokens=20, max_cost=200, **dollar) == 1
        assert "might pass --max_cost" in capsys.readouterr().err
        assert len(server.requests) == 10
        assert not list(tmp_path.rglob("judge.json"))
        assert run(tmp_path, server, max_tokens=20) == 0
        assert len(server.requests) == 20
    assert values(tmp_path / "out")["win rate"] == 1


def test_a_dry_run_estimates_and_leaves_nothing(tmp_path, capsys):
    write_sets(tmp_path, ["9"] * 10, ["1"] * 10)
    with Server() as server:
        assert run(tmp_path, server, "--dry_run") == 0
        assert server.requests == []
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert "20 instructions to ask" in printed.out
    assert "at most, if each answer takes 16: 320 answer tokens, $0.00" in printed.out
    assert "no result yet" not in printed.err


# ------------------------------------------------------------------ folders and privacy


def test_judgements_of_other_answers_models_or_prompts_do_not_mix(tmp_path, monkeypatch):
    write_sets(tmp_path, list("999"), list("111"))
    with Server(annotation_server.judge(better)) as server:
        run(tmp_path, server, limit=4)
        with pytest.raises(UsageError, match="model gpt-4o-mini, not m; .* name another --output"):
            run(tmp_path, server, model="m")
        with pytest.raises(UsageError, match="temperature 0.0, not 1.0; .*name another --output"):
            run(tmp_path, server, temperature=1)
        write_sets(tmp_path, list("989"), list("111"))
        with pytest.raises(UsageError, match="2 judgements of other answers, or by another prompt"):
            run(tmp_path, server)
        write_sets(tmp_path, list("999"), list("111"))
        with monkeypatch.context() as patch:
            patch.setattr(judge, "PROMPT", judge.PROMPT + " ")
            with pytest.raises(UsageError, match="4 judgements of other answers, or by another"):
                run(tmp_path, server)
        assert len(server.requests) == 4
        write_sets(tmp_path, list("99999"), list("11119"))
        run(tmp_path, server)
        assert len(server.requests) == 9  # the last pair is one prompt, twice
    assert values(tmp_path / "out")["win rate"] == pytest.approx(0.9)


def test_private_instructions_leave_traces_in_the_private_folder_only(
    tmp_path, capsys, private_modes
):
    write_sets(tmp_path, list("999"), list("111"))
    with Server(annotation_server.judge(better)) as server:
        assert run(tmp_path, server, "--dry_run", public=False) == 0
        assert "warning" not in capsys.readouterr().err
        assert run(tmp_path, server, public=False) == 0
        assert f"warning: private instructions or answers are sent to {server.url}" in (
            capsys.readouterr().err
        )
        out = tmp_path / "out"
        assert [path.name for path in out.iterdir()] == ["private"]
        assert private_modes == ["0o700"]
        assert {path.name for path in (out / "private").iterdir()} == {
            "README.md", "judge.json", "judgements",
        }  # fmt: skip
        assert result(out / "private")[0]["private"]
        assert len(read_records(out / "private" / "judgements")) == 6


@pytest.mark.parametrize(("public", "remedy"), [(True, "add"), (False, "leave")])
def test_private_and_public_judgements_are_not_in_one_folder(tmp_path, public, remedy):
    write_sets(tmp_path, list("999"), list("111"))
    kind = "public" if public else "private"
    with Server(annotation_server.judge(better)) as server:
        run(tmp_path, server, limit=2, public=public)
        with pytest.raises(UsageError, match=f"begun with {kind} texts; {remedy} --public"):
            run(tmp_path, server, public=not public)
        assert len(server.requests) == 2
