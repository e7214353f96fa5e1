"""Faults made for real: a disk that is small, a terminal that goes away."""

import fcntl
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest

from tests.paths import ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def on_small_disk(folder, size: str, *command: str) -> subprocess.CompletedProcess:
    """Run a Python command in `folder`, which is a file system of `size` while it runs.

    What is written there goes with it.
    """
    mount = 'mount -t tmpfs -o size="$1" none "$2" && cd "$2" && shift 2 && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    permitted = (
        shutil.which("unshare")
        and not subprocess.run([*inside, "1m", str(folder), "true"], capture_output=True).returncode
    )
    if not permitted:
        pytest.skip("no small file system can be mounted here")
    return subprocess.run(
        [*inside, size, str(folder), sys.executable, *command], env=ENVIRONMENT,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


class Terminal:
    """A process on a terminal of its own, which `close` takes away as the end of a session does."""

    def __init__(self, *command: str):
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def read_until(self, text: str = "", condition: Callable[[], bool] = lambda: True) -> str:
        """Read and return what it writes until `text` was in it and `condition` holds."""
        seen = b""
        while text.encode() not in seen or not condition():
            seen += os.read(self._master, 1024)
        return seen.decode(errors="replace")

    def close(self) -> int:
        """Returns the process's exit code."""
        os.close(self._master)
        return self._process.wait(120)
