"""Exit codes and one-line messages of every command line."""

import errno
import signal
import subprocess
import sys

import pytest

from privacy_checks.observed_run import signal_handlers_restored
from tests.paths import ROOT
from utils.cli import UsageError, run_cli, say


@pytest.fixture(autouse=True)
def _signal_handlers():
    with signal_handlers_restored():
        yield


def exit_code(main):
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    return ended.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (130, 130)])
def test_what_main_returns_is_the_exit_code(capfd, returned, code):
    assert exit_code(lambda: returned) == code
    assert capfd.readouterr() == ("", "")


def test_a_usage_error_is_one_line_and_code_2(capfd):
    assert exit_code(raising(UsageError("--eps 0: must be above 0; use 8"))) == 2
    assert capfd.readouterr() == ("", "error: --eps 0: must be above 0; use 8\n")


def test_an_interrupt_is_code_130(capfd):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


def test_a_full_disk_is_one_line_and_code_1(capfd):
    def main():
        with open("/dev/full", "wb") as file:
            file.write(b"x")

    assert exit_code(main) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM]
)
def test_a_disk_that_is_not_ours_to_write_is_code_1_and_names_the_file(capfd, number):
    assert exit_code(raising(OSError(number, "reason", "outputs/run"))) == 1
    err = capfd.readouterr().err
    assert "reason: 'outputs/run'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "defect", [ValueError("a defect"), OSError(errno.ENOENT, "no such file"), AssertionError()]
)
def test_a_defect_keeps_its_traceback(defect):
    with pytest.raises(type(defect)) as raised:
        run_cli(raising(defect))
    assert raised.value is defect


def test_say_leaves_stdout_to_the_product(capfd):
    say("for people")
    assert capfd.readouterr() == ("", "for people\n")


def test_sigterm_lets_a_command_clean_up_whatever_follows_it(tmp_path):
    script = """
import os, pathlib, signal, time
from utils.cli import run_cli
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print("cleaned", flush=True)
run_cli(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "cleaned\n", "interrupted\n")


def test_ctrl_c_works_in_a_process_that_inherited_its_being_ignored():
    script = """
import time
from utils.cli import run_cli
def main():
    print("ready", flush=True)
    time.sleep(60)
run_cli(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
