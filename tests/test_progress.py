"""Progress: a bar on a terminal, lines with the time elsewhere."""

import re
import sys
from contextlib import suppress

import pytest

from tests.faults import Terminal
from tests.training import run_process
from utils import progress
from utils.progress import Progress

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ count: ([\d,]+)(/[\d,]+)?, [\d.,e+]+ row/s, "
    r"(\d\d:\d\d (left|in all))(, .*)?"
)
COUNTING = """
from utils.progress import Progress
for _ in Progress(range(1500), "count", unit="row"):
    pass
"""


def lines_of(text: str) -> list[re.Match]:
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(matches), text
    return matches


def test_without_a_terminal_there_is_a_last_line_and_nothing_is_redrawn():
    finished = run_process("-c", COUNTING)
    assert (finished.returncode, finished.stdout) == (0, "")
    assert not re.search("[\r\x1b]", finished.stderr)
    (last,) = lines_of(finished.stderr)
    assert (last[1], last[2], last[4]) == ("1,500", "/1,500", "in all")


def test_on_a_terminal_there_is_a_bar():
    terminal = Terminal("-c", COUNTING)
    shown = terminal.read_until("1500/1500")
    terminal.close()
    assert "\rcount: 100%|" in shown
    assert "Z count: " not in shown


def test_a_line_is_said_when_it_is_time_for_one(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "LINE_SECONDS", 30.0)
    monkeypatch.setattr(Progress, "_time", staticmethod(lambda: clock[0]), raising=False)
    with Progress(None, "count", unit="row", total=3600, initial=1200) as bar:
        bar._time = lambda: clock[0]
        bar.start_t = bar.last_print_t = 0.0
        for second in range(1, 121):
            clock[0] = float(second)
            bar.update(10)
            bar.set_postfix_str("fine")
        Progress.write("a note", file=sys.stderr)
        said = capsys.readouterr().err
        note, lines = said.splitlines()[-1], lines_of("\n".join(said.splitlines()[:-1]))
        assert note == "a note"
        assert [line[1] for line in lines] == ["1,500", "1,800", "2,100", "2,400"]
        assert [line[3] for line in lines] == [
            "03:30 left",
            "03:00 left",
            "02:30 left",
            "02:00 left",
        ]
        assert {line[5] for line in lines[1:]} == {", fine"}
    (last,) = lines_of(capsys.readouterr().err)
    assert last[1] == "2,400"
    assert last[3] == "02:00 left"


def test_a_hidden_one_says_nothing_and_one_that_is_cut_short_says_where(capsys):
    for _ in Progress(range(3), "count", unit="row", hidden=True):
        pass
    assert capsys.readouterr().err == ""
    for number in Progress(iter(range(3)), "count", unit="row", leave=False):
        if number:
            break
    (last,) = lines_of(capsys.readouterr().err)
    assert last[2] is None


@pytest.mark.parametrize(("count", "shown"), [(0, False), (2, True)])
def test_one_that_counts_nothing_has_no_last_line(capsys, count, shown):
    with suppress(KeyError), Progress(what="read", unit="row") as counted:
        counted.update(count)
        raise KeyError
    assert bool(capsys.readouterr().err) == shown
