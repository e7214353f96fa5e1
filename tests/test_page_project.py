"""What a project's folder holds for a page."""

import json
from pathlib import Path

import pytest

from evaluation.page.project import with_project
from evaluation.report import Settings
from evaluation.results import Result, Score, write_result
from utils.cli import UsageError
from utils.files import write_json


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")


def run(name: str, dataset: str, eps: float) -> None:
    write_json(f"{name}/run_config.json", {"arguments": {"dataset_name": dataset, "eps": eps}})


def result(folder: str, *, private: bool) -> None:
    score = Score("MAUVE", "synthetic", 0.5)
    write_result(Path(folder), Result("distribution", "Close?", private, "none", [score]), {})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one of everything, and its folder as the working folder's `p`."""
    monkeypatch.chdir(tmp_path)
    run("p/outputs/instructions", "p/data/instructions", 6)
    run("p/outputs/answers", "p/data/labelled_instructions", -1)
    touch(
        "p/resampling/private_data/histogram_ledger.jsonl",
        "p/resampling/private_data/private/histogram_ledger.jsonl",
        "p/resampling/synthetic/instructions.jsonl", "p/resampling/selected/selected.jsonl",
        "p/resampling/topic_histogram/topic_histogram.json",
        "p/inference_outputs/instructions/shard-0.jsonl", "p/annotations/answers.jsonl",
        "p/evaluation_outputs/judge/private/judgements/answers.jsonl", "p/data/instructions/train",
    )  # fmt: skip
    write_json("p/data/labelled_instructions/preparation.json", {"answers": "p/annotations"})
    touch("p/data/labelled_instructions/train/data")
    result("p/evaluation_outputs/instructions", private=True)
    result("p/evaluation_outputs/answers", private=False)
    return Path("p")


def found(project: Path, **given) -> Settings:
    return with_project(Settings(**(defaults() | given)), project)


def defaults() -> dict:
    lists = ("run", "histogram", "samples", "evaluations", "synthetic_runs")
    single = (
        "extraction",
        "selection",
        "topics",
        "annotations",
        "real",
        "split",
        "delta",
        "data_name",
        "project",
    )
    flags = {"internal": False, "public_prompts": False, "overwrite": False, "num_shown": 6}
    return {
        **dict.fromkeys(single), **{name: [] for name in lists}, **flags,
        "output": Path("out"), "allow_above_target": False,
    }  # fmt: skip


def test_everything_is_found_and_nothing_under_private(project):
    page = found(project)
    assert page.run == [project / "outputs/instructions"]
    assert page.synthetic_runs == [project / "outputs/answers"]
    assert page.histogram == [project / "resampling/private_data/histogram_ledger.jsonl"]
    assert page.samples == [project / "inference_outputs/instructions"]
    assert page.extraction == project / "resampling/synthetic"
    assert page.selection == project / "resampling/selected"
    assert page.topics == project / "resampling/topic_histogram"
    assert page.annotations == project / "annotations"
    assert page.evaluations == [project / "evaluation_outputs/answers"]
    folders = [project / "evaluation_outputs" / name for name in ("answers", "instructions")]
    assert found(project, internal=True).evaluations == folders


def test_what_flags_name_is_added_and_not_named_twice(project):
    run("elsewhere", "p/data/instructions", 2)
    own = Path("p/outputs/../outputs/instructions")
    page = found(project, run=[Path("elsewhere"), own], selection=Path("another"))
    assert page.run == [Path("elsewhere"), own]
    assert page.selection == Path("another")


@pytest.mark.parametrize(
    ("dataset", "answers"),
    [
        ("p/data/labelled_instructions", "other/annotations"),
        ("p/data/labelled_real", "p/annotations"),
        ("labelled_real", "p/annotations"),
        # Of this name here, and another one.
        ("labelled_instructions", "p/annotations"),
    ],
)
def test_a_run_without_privacy_is_private_unless_its_data_are_the_annotations(
    project, dataset, answers
):
    """A row of real pairs must not pass for a synthetic one."""
    touch("p/data/labelled_real/train/data", "data/labelled_instructions/train/data")
    write_json("p/data/labelled_instructions/preparation.json", {"answers": answers})
    run("p/outputs/answers", dataset, -1)
    page = found(project)
    assert page.run == [project / "outputs/answers", project / "outputs/instructions"]
    assert page.synthetic_runs == []
    # It is the user's claim then, as without --project.
    page = found(project, synthetic_runs=[project / "outputs/answers"])
    assert page.run == [project / "outputs/instructions"]


def test_a_run_elsewhere_is_known_by_its_data_sets_last_name(project):
    run("p/outputs/answers", "labelled_instructions", -1)
    assert found(project).synthetic_runs == [project / "outputs/answers"]


def test_a_private_run_on_annotations_stays_private(project):
    run("p/outputs/answers", "p/data/labelled_instructions", 3)
    assert found(project).synthetic_runs == []


def test_two_selections_are_for_the_user_to_choose_from(project):
    touch("p/resampling/more/selected.jsonl")
    with pytest.raises(UsageError, match=r"p/resampling/more and .*; name one with --selection"):
        found(project)
    more = project / "resampling" / "more"
    assert found(project, selection=more).selection == more


def test_a_folder_without_a_run_is_refused(project, tmp_path):
    with pytest.raises(UsageError, match="no training run on private rows; name a RUN"):
        found(tmp_path / "none")


def test_a_record_that_is_damaged_takes_part_in_nothing(project):
    for content in ("[1]", "{", json.dumps({"arguments": {}})):
        Path("p/outputs/answers/run_config.json").write_text(content)
        assert found(project).synthetic_runs == []
