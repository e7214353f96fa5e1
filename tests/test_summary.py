"""The summary of a run on one screen."""

import json

import pytest

from evaluation.summary import main
from utils.cli import UsageError
from utils.files import JsonlAppender, write_json
from utils.privacy.guarantee import build_report


@pytest.fixture
def run_folder(tmp_path):
    """A finished DP run, as far as the summary reads one."""
    report = {
        "guarantee": True, "epsilon": {"upper": 7.9861}, "delta": 1e-5, "steps_taken": 20,
        "noise_multiplier": 0.541, "why": "", "unit": "one example: a row of the train split",
    }  # fmt: skip
    write_json(tmp_path / "run" / "privacy_report.json", report)
    with JsonlAppender(tmp_path / "run" / "private" / "metrics.jsonl") as log:
        log.append([{"step": 0, "validation_loss": 4.2}, {"step": 1, "train_loss": 4.5}])
        log.append([{"step": 2, "train_loss": 4.1}, {"step": 2, "validation_loss": 4.0}])
    return tmp_path / "run"


def test_guarantee_losses_and_samples_are_shown(run_folder, tmp_path, capsys):
    for rank in range(2):
        with JsonlAppender(tmp_path / "samples" / f"shard-{rank}.jsonl") as shard:
            shard.append(
                {"id": i, "prompt": "why?" * (i == 1), "text": f"text {i}"}
                for i in (rank, rank + 2)
            )
    main(["--run", str(run_folder), "--samples", str(tmp_path / "samples"), "--num_shown", "3"])
    shown = capsys.readouterr().out
    # An upper bound, rounded up.
    assert "epsilon 7.987 at delta 1e-05, one example added or removed; 20 steps" in shown
    assert "train loss       4.500 -> 4.100" in shown
    assert "validation loss  4.200 -> 4.000" in shown
    assert "4 samples" in shown
    assert [line.strip() for line in shown.splitlines() if "text" in line] == [
        "text 0", "text 1", "text 2",
    ]  # fmt: skip
    assert "[1] why?" in shown


def test_what_the_base_writes_stands_next_to_each_sample(run_folder, tmp_path, capsys):
    for folder, count in (("tuned", 3), ("base", 2)):
        with JsonlAppender(tmp_path / folder / "shard-0.jsonl") as shard:
            shard.append({"id": i, "prompt": "", "text": f"{folder} {i}" * i} for i in range(count))
    main([
        "--run", str(run_folder), "--samples", str(tmp_path / "tuned"),
        "--untuned", str(tmp_path / "base"),
    ])  # fmt: skip
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("[0]") :] == [
        "[0]", "untuned: (nothing)", "tuned:   (nothing)",
        "[1]", "untuned: base 1", "tuned:   tuned 1",
        "[2]", "tuned 2tuned 2",
    ]  # fmt: skip


def test_a_run_without_guarantee_says_so(run_folder, capsys):
    write_json(run_folder / "privacy_report.json", build_report(None))
    main(["--run", str(run_folder)])
    assert "NO GUARANTEE     trained without differential privacy" in capsys.readouterr().out


def test_the_unit_is_the_report_s_and_a_damaged_report_is_a_line(run_folder, capsys):
    file = run_folder / "privacy_report.json"
    write_json(file, json.loads(file.read_text()) | {"unit": "one person: all rows of a user_id"})
    main(["--run", str(run_folder)])
    assert "one person added or removed" in capsys.readouterr().out
    file.write_text(file.read_text()[:50])
    with pytest.raises(UsageError, match="privacy_report.json is not a JSON object; restore it"):
        main(["--run", str(run_folder)])


def test_what_is_not_there_is_named(run_folder, tmp_path):
    with pytest.raises(UsageError, match="--run .*nowhere.*no privacy_report.json"):
        main(["--run", str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="--samples .*empty.*no shard"):
        main(["--run", str(run_folder), "--samples", str(tmp_path / "empty")])
