"""The form of all figures: private ones lie apart, and nothing is replaced or taken on trust."""

import json
from pathlib import Path

import pytest

from evaluation.results import (
    Chart,
    Result,
    Score,
    read_results,
    require_new_result,
    table,
    write_result,
)
from utils.cli import UsageError

SCORES = [Score("loss (nats)", "a", 1.23456, 1.1, 1.3, 2.0, "lower"), Score("count", "b", 22380.0)]


def result(private, tool="tool", **changes):
    chart = Chart("Lengths", "words", "share", {"a": [[1, 0.5], [2, 1.0]]})
    fields = {"title": "A title", "interval": "95%", "scores": SCORES, "charts": [chart]}
    return Result(tool=tool, private=private, **fields | changes)


@pytest.mark.parametrize("private", [False, True])
def test_a_result_lies_where_its_kind_belongs(tmp_path, private):
    settings = {"output": tmp_path, "num_rows": 3}
    path = write_result(tmp_path, result(private), settings)
    assert path == (tmp_path / "private" if private else tmp_path) / "tool.json"
    assert (tmp_path / "private" / "README.md").exists() == private
    if private:
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_results(tmp_path, not private) == []
    (read,) = read_results(tmp_path, private)
    assert read["scores"][0]["control"] == 2.0
    assert read["charts"][0]["lines"] == {"a": [[1, 0.5], [2, 1.0]]}
    assert read["settings"] == {"output": str(tmp_path), "num_rows": 3}
    assert "torch" in read["versions"]


def test_a_private_result_is_for_its_owner_alone(tmp_path, private_modes):
    write_result(tmp_path / "results", result(True), {})
    assert private_modes == ["0o700"]


@pytest.mark.parametrize("private", [False, True])
def test_an_earlier_result_of_either_kind_stays(tmp_path, private):
    require_new_result(tmp_path, "tool")
    write_result(tmp_path, result(private), {})
    require_new_result(tmp_path, "other")
    with pytest.raises(UsageError, match=r"tool\.json exists"):
        require_new_result(tmp_path, "tool")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tool": "other", "private": false}',
                                     '{"tool": "tool", "private": true}'])  # fmt: skip
def test_what_is_no_result_of_its_place_is_refused(tmp_path, content):
    (tmp_path / "tool.json").write_text(content)
    with pytest.raises(UsageError, match=r"tool\.json is not a result of an evaluation"):
        read_results(tmp_path, private=False)


def test_results_come_in_order_of_their_names(tmp_path):
    for tool in ("b", "c", "a"):
        write_result(tmp_path, result(False, tool), {"path": Path("x")})
    assert [each["tool"] for each in read_results(tmp_path, False)] == ["a", "b", "c"]
    assert json.loads((tmp_path / "a.json").read_text())["settings"] == {"path": "x"}


def test_the_table_shows_intervals_and_controls_where_there_are_any():
    lines = table(result(False, control="others", notes=["A note."])).splitlines()
    assert lines[0] == "A title"
    assert lines[1].split() == ["value", "interval", "control"]
    assert lines[2].split() == ["loss", "(nats)", "a", "1.235", "1.1", "to", "1.3", "2"]
    assert lines[3].split() == ["count", "b", "22,380"]
    assert lines[4:] == ["interval: 95%", "control: others", "A note."]
    assert "control" not in table(result(False))
