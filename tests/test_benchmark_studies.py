"""What studies share: commands that are run once, whatever stops the study."""

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.studies import run_once, side_by_side
from tests.paths import ROOT
from utils.cli import UsageError

# Makes a folder, which it refuses to find.
MAKE = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); print('made')"


def test_a_command_that_has_ended_is_passed_over(tmp_path):
    output = tmp_path / "made"
    for _ in range(2):
        run_once(tmp_path, "make it", "-c", MAKE, str(output), makes=[output])
        assert (tmp_path / "logs" / "make-it.log").read_text() == "made\n"
        (output / "kept").touch()


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_a_stop_has_left_is_made_anew(tmp_path, is_folder):
    output = tmp_path / "made"
    output.mkdir() if is_folder else output.touch()
    (output / "half").touch() if is_folder else None
    with pytest.raises(UsageError, match=r"make failed: FileExistsError.*in .*logs/make.log"):
        run_once(tmp_path, "make", "-c", MAKE, str(output))
    run_once(tmp_path, "make", "-c", MAKE, str(output), makes=[output])
    assert list(output.iterdir()) == []
    assert (tmp_path / "logs" / "make.log").read_text() == "made\n"


def test_a_command_that_outlives_its_study_is_waited_for(tmp_path, capsys):
    output = tmp_path / "made"
    begun = f"open({str(tmp_path / 'begun')!r}, 'w')"
    slow = f"import time; {begun}; time.sleep(2); {MAKE}"
    study = f"""
from pathlib import Path
from benchmarks.studies import run_once
run_once(Path({str(tmp_path)!r}), "make", "-c", {slow!r}, {str(output)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", study], cwd=ROOT)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_once(tmp_path, "make", "-c", MAKE, str(output), makes=[output])
    assert "make runs already; waiting for its end" in capsys.readouterr().err
    assert output.is_dir()


def test_a_failure_is_said_once(tmp_path, capsys):
    def step(name):
        run_once(tmp_path, name, "-c", "raise SystemExit('no such thing')")

    with pytest.raises(UsageError, match="one failed: no such thing"):
        side_by_side(1, step, ["one", "two"])
    assert "no such thing" not in capsys.readouterr().err
