"""Commands in processes of their own that start at once, since their imports lie behind them.

For what the end of a process leaves: signals, kills, two at a time. How a command itself starts is
what tests with `subprocess` are for.
"""

import functools
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

from tests.faults import ENVIRONMENT
from tests.paths import ROOT
from utils.cli import run_cli


@functools.cache
def fork_server() -> ForkServerContext:
    """Makes processes of one that has imported the scripts and planned a run, and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "inference", "tests.planned"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


class Command:
    """`python -m MODULE ARGV` with one thread; its methods are those of `subprocess.Popen`.

    Args:
        dies: the process gets a signal at a call of a function: its module and name, such as
            "train.assign_gradient", the number of the call (from 1), and the signal.
        environment: further variables.
    """

    def __init__(
        self,
        module: str,
        argv: list[str],
        *,
        folder: Path = ROOT,
        dies: tuple[str, int, int] | None = None,
        **environment: str,
    ):
        # It goes with this object.
        self._stderr = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self._process = fork_server().Process(
            target=_run, args=(module, argv, folder, dies, self._stderr.name, environment)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stderr(self) -> str:
        """What it has written until now."""
        return Path(self._stderr.name).read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 200) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it goes on after {timeout} s: {self.stderr}"
        return self.returncode


def _run(module, argv, folder, dies, stderr, environment) -> None:
    sys.argv = [str(ROOT / f"{module.replace('.', '/')}.py"), *argv]
    os.environ |= environment
    os.chdir(folder)
    for stream, name in ((1, os.devnull), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    if dies:
        _die_at(*dies)
    run_cli(importlib.import_module(module).main)


def _die_at(target: str, call: int, number: int) -> None:
    place, name = target.rsplit(".", 1)
    holder = importlib.import_module(place)
    original, calls = getattr(holder, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(holder, name, dying)


def run_until_killed(
    argv: list[str], target: str, call: int, number: int = signal.SIGKILL
) -> Command:
    """Train in a process that gets a signal at the given call of a function; see `Command`."""
    process = Command("train", argv, dies=(target, call, number))
    process.wait()
    return process
