"""Neighbour replay: one example moves the clipped sum by at most C, and a coupling shows."""

import json

import pytest

from privacy_checks import replay
from tests.mutated_train import observe_mutated_training
from utils.texts.prompts import UNCONDITIONAL

EXAMPLES = 8
DRAW = "on_main_process(partial(mechanism.draw, step))"
TYPE_A, TYPE_C = (UNCONDITIONAL, False, 1.4), ("vicuna", True, 1.4)


def test_an_example_moves_the_sum_by_at_most_the_clip_norm():
    for moves in replay.replay([TYPE_A, TYPE_C], EXAMPLES):
        assert max(moves) <= 1 + replay.TOLERANCE
        # Both a clipped example, whose move is the clip norm, and one that is not.
        assert max(moves) > 1 - 1e-4
        assert 0.2 < min(moves) < 0.9


def test_so_does_one_that_two_processes_share():
    alone = replay.replay([TYPE_C], EXAMPLES)
    (moves,) = replay.replay([TYPE_C], EXAMPLES, processes=2)
    assert max(moves) <= 1 + replay.TOLERANCE
    assert moves == pytest.approx(alone[0], abs=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "clip_norm"),
    [
        ("losses.sum().backward()", "(losses.sum() / (counts > 0).sum()).backward()", 1.4),
        ("losses.sum().backward()", "(sums.sum() / counts.sum()).backward()", 1.4),
        ("released / mechanism.divisor", "released / max(1, len(indices))", 1.4),
        (
            "add_clipped_sum(total, plan.clip_norm,",
            "add_clipped_sum(total, 1.01 * plan.clip_norm,",
            1.4,
        ),
        (DRAW, f"{DRAW}[:4]", 1.4),  # a batch of a fixed size
    ],
    ids=["batch mean", "token mean", "realised divisor", "loose clip", "refilled batch"],
)
def test_a_coupling_between_examples_shows(monkeypatch, old, new, clip_norm):
    observe_mutated_training(monkeypatch, old, new)
    (moves,) = replay.replay([(UNCONDITIONAL, False, clip_norm)], EXAMPLES)
    assert max(moves) > 1 + replay.TOLERANCE


@pytest.mark.slow
def test_every_case_of_the_command(tmp_path, capsys):
    file = tmp_path / "replay.json"
    assert replay.main([f"--json={file}"]) == 0
    assert "PASSED" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["passed"] is True
    assert len(result["cases"]) == 16
    assert {case["processes"] for case in result["cases"]} == {1, 2}
    assert all(case["examples_clipped"] > 0 for case in result["cases"])


def test_the_command_fails_where_a_sum_moves_too_far(monkeypatch, capsys):
    monkeypatch.setattr(replay, "replay", lambda cases, *_: [[0.5, 1.001]] * len(cases))
    assert replay.main([]) == 1
    assert "FAILED" in capsys.readouterr().out
