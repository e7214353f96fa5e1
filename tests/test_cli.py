"""Exit codes and one-line messages of every command line."""

import errno
import signal
import subprocess
import sys

import pytest

from tests.faults import ENVIRONMENT, Terminal
from tests.helpers import slow
from tests.paths import ROOT
from utils.cli import UsageError, run_cli, say, stop_handlers_restored


@pytest.fixture(autouse=True)
def _signal_handlers():
    with stop_handlers_restored():
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


TALKS = """
import pathlib, sys, time
from utils.cli import run_cli, say
def main():
    for line in range(200):
        print("product", line, flush=True)
        say(f"line {line}")
        time.sleep(0.005)
    pathlib.Path(sys.argv[1]).write_text("saved")
    return 3
run_cli(main)
"""


def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    quiet = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    terminal = Terminal("-c", quiet + TALKS, str(tmp_path / "file"))
    terminal.read_until("line 5")
    assert terminal.close() == 3
    assert (tmp_path / "file").read_text() == "saved"


def test_a_terminal_that_is_closed_interrupts_and_lets_a_command_clean_up(tmp_path):
    script = """
import pathlib, sys, time
from utils.cli import run_cli, say
def main():
    try:
        say("ready")
        time.sleep(60)
    finally:
        say("ending")
        pathlib.Path(sys.argv[1]).write_text("cleaned")
run_cli(main)
"""
    terminal = Terminal("-c", script, str(tmp_path / "file"))
    terminal.read_until("ready")
    assert terminal.close() == 130
    assert (tmp_path / "file").read_text() == "cleaned"


@pytest.mark.parametrize("redirection", ["| head -1", "2>&1 | head -1", ">&- 2>&-", "2>/dev/full"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, redirection):
    line = f'"$0" -c "$1" "$2" {redirection}; echo ${{PIPESTATUS[0]}} >"$2.code"'
    command = ["bash", "-c", line, sys.executable, TALKS, str(tmp_path / "file")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "file").read_text() == "saved"
    assert (tmp_path / "file.code").read_text() == "3\n"
    assert "Traceback" not in finished.stderr
    assert "Exception ignored" not in finished.stderr


def test_a_product_that_does_not_fit_on_the_disk_is_a_failure(tmp_path):
    line = '"$0" -c "$1" "$2" >/dev/full'
    command = ["bash", "-c", line, sys.executable, TALKS, str(tmp_path / "file")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: [Errno 28] No space left on device")


LIMITED = """
import resource, sys
from utils.cli import run_cli
def main():
    {body}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
run_cli(main)
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("open('file', 'wb').write(bytes(10_000))", "[Errno 27] File too large"),
        ("open('/dev/null/file', 'wb')", "[Errno 20] Not a directory: '/dev/null/file'"),
        ("open('x' * 300, 'wb')", "[Errno 36] File name too long"),
        (
            "import safetensors.numpy, numpy; safetensors.numpy.save_file("
            "{'a': numpy.zeros(10_000)}, 'file')",
            "[Errno 27] File too large",
        ),
    ],
)
def test_what_a_disk_does_not_take_is_one_line(tmp_path, body, reason):
    script = LIMITED.replace("{body}", body)
    command = [sys.executable, "-c", script]
    finished = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr.startswith(f"error: {reason}")
    assert finished.stderr.count("\n") == 1


def test_say_obeys_no_server(capfd):
    say("\x1b]0;title\x07 \u202eabc")
    assert capfd.readouterr().err == "\ufffd]0;title\ufffd \ufffdabc\n"


@pytest.mark.parametrize("command", ["train.py", slow("inference.py")])
def test_no_notice_of_a_library_comes_before_the_help(command):
    finished = subprocess.run(
        [sys.executable, command, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True
    )
    assert finished.stdout.startswith(b"usage: ")
    assert (finished.returncode, finished.stderr) == (0, b"")
