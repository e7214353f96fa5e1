"""Launch lines for the shell, printed or run."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from utils.cli import (
    EXIT_CODE_VARIABLE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    UsageError,
    handle_stops,
    say,
    stop_handlers_restored,
)

ROOT = Path(__file__).resolve().parents[2]
# What accelerate means by port 0, and the port at which it has machines meet.
ANY_FREE_PORT, DEFAULT_PORT = 0, 29500
FORWARD_SECONDS = 1.0


def launch_command(
    script: str,
    arguments: list[str],
    gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    main_process_ip: str | None = None,
    main_process_port: int | None = None,
) -> list[str]:
    """The argument vector that starts `script` through `accelerate launch`.

    Every choice that accelerate would otherwise read from a user's configuration file or ask for
    is stated, so that the line does the same on every machine. `--quiet` spares the user the
    launcher's stack trace below the script's own error line.

    Args:
        gpus: processes on each machine.
        machine_rank: the machine that the line is for, from 0.
        main_process_ip, main_process_port: where machine 0 is reached; on a single machine the
            port is any free one.

    Raises:
        UsageError: more than one machine, and no address or no such rank.
    """
    if num_machines > 1 and main_process_ip is None:
        raise UsageError(f"--num_machines {num_machines} needs --main_process_ip, machine 0's")
    if machine_rank >= num_machines:
        raise UsageError(
            f"--machine_rank {machine_rank}: ranks run from 0 to --num_machines - 1, which is "
            f"{num_machines - 1}"
        )
    processes = gpus * num_machines
    launcher = ["accelerate", "launch", "--quiet", "--num_machines", str(num_machines)]
    launcher += ["--num_processes", str(processes)]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if num_machines > 1 and main_process_ip is not None:
        launcher += ["--machine_rank", str(machine_rank), "--main_process_ip", main_process_ip]
    if processes > 1:
        port = main_process_port or (DEFAULT_PORT if num_machines > 1 else ANY_FREE_PORT)
        launcher += ["--main_process_port", str(port), "--multi_gpu"]
    path = script if Path.cwd() == ROOT else str(ROOT / script)
    return [*launcher, path, *arguments]


def with_this_python(command: list[str]) -> list[str]:
    """A launch line with the accelerate of this interpreter, its environment activated or not."""
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]


def print_or_run(command: list[str], run: bool) -> int:
    """Print `command` as one shell line on stdout, or run it and return its exit code."""
    if not run:
        print(shlex.join(command))
        return 0
    say(f"+ {shlex.join(command)}")
    launcher = with_this_python(command)
    stops: list[int] = []
    with tempfile.TemporaryDirectory() as folder, stop_handlers_restored():
        exit_code = Path(folder, "exit_code")
        handle_stops(lambda number, _: stops.append(number))
        # The launcher must outlive whatever stops the script, which then saves its work.
        process = subprocess.Popen(
            launcher,
            env=os.environ | {EXIT_CODE_VARIABLE: str(exit_code)},
            preexec_fn=_ignore_stops,
        )
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(FORWARD_SECONDS)
            if stops:
                _stop_scripts(process)
        if process.returncode and exit_code.exists():
            return int(exit_code.read_text()) or EXIT_FAILED
        if stops and not exit_code.exists():
            return EXIT_INTERRUPTED
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _ignore_stops() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop_scripts(launcher: subprocess.Popen) -> None:
    """Ask the scripts of a launcher to stop, again and again: one that begins does not hear it.

    A script that was asked before, or by the terminal itself, goes on with its end.
    """
    with suppress(psutil.Error):  # it has ended meanwhile
        for script in psutil.Process(launcher.pid).children():
            script.terminate()
