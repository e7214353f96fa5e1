"""Neighbour replay: one example moves the clipped sum by at most C, and a coupling shows."""

import json

import numpy as np
import pytest

from privacy_checks import replay
from privacy_checks.persons import MOST_ROWS, ROWS_IN_A_STEP, replayed_owners, unit_flags
from tests.mutated_train import observe_mutated_training
from utils.texts.prompts import UNCONDITIONAL

EXAMPLES = 8
ADD = "plan = self.plan\n        "
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


# ---------------------------------------------------------------- persons


def test_a_person_moves_the_sum_by_at_most_the_clip_norm():
    for moves in replay.replay([TYPE_A, TYPE_C], EXAMPLES, unit=True):
        assert max(moves) <= 1 + replay.TOLERANCE
        assert max(moves) > 1 - 1e-4
        assert min(moves) < 0.9


def test_so_does_one_where_two_processes_share_the_persons():
    alone = replay.replay([TYPE_A], EXAMPLES, unit=True)
    (moves,) = replay.replay([TYPE_A], EXAMPLES, processes=2, unit=True)
    assert max(moves) <= 1 + replay.TOLERANCE
    assert moves == pytest.approx(alone[0], abs=1e-4)


def test_so_does_one_in_bfloat16(monkeypatch):
    in_float32 = replay.replay([TYPE_A], EXAMPLES, unit=True)
    monkeypatch.setattr(replay, "unit_flags", lambda k: [*unit_flags(k), "--dtype=bfloat16"])
    (moves,) = replay.replay([TYPE_A], EXAMPLES, unit=True)
    assert max(moves) <= 1 + replay.TOLERANCE
    assert moves != pytest.approx(in_float32[0], abs=1e-4)


def test_persons_have_more_rows_than_a_step_takes_and_lie_between_one_another():
    owners = replayed_owners(EXAMPLES)
    sizes = np.bincount(owners)
    assert (sizes.min(), sizes.max()) == (1, MOST_ROWS)
    assert MOST_ROWS > ROWS_IN_A_STEP
    assert (np.diff(owners) < 0).sum() > 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DRAW, f"{DRAW}[:9]"),
        ("released / mechanism.divisor", "released / max(1, len(indices))"),
        ("self._captured, total, plan.clip_norm", "self._captured, total, 1.01 * plan.clip_norm"),
        (f"{ADD}if self._units:", f"{ADD}if False:"),  # rows are clipped
    ],
    ids=["refilled batch", "realised divisor", "loose clip", "rows are clipped"],
)  # fmt: skip
def test_a_coupling_between_persons_shows(monkeypatch, old, new):
    observe_mutated_training(monkeypatch, old, new)
    (moves,) = replay.replay([TYPE_A], EXAMPLES, unit=True)
    assert max(moves) > 1 + replay.TOLERANCE


def test_the_command_says_that_it_is_persons(monkeypatch, capsys):
    asked = []

    def replayed(cases, examples, processes, unit):
        asked.append((examples, processes, unit))
        return [[0.5, 1.0]] * len(cases)

    monkeypatch.setattr(replay, "replay", replayed)
    assert replay.main(["--unit", "--examples=2"]) == 0
    assert asked == [(2, 1, True), (2, 2, True)]
    assert "1 of 2 persons clipped" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


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
