"""Faults made for real: a disk that is small, a terminal that goes away."""

import os
import pty
import shutil
import subprocess
import sys

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
        pid, self._master = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, *command], ENVIRONMENT)
        self.pid = pid

    def read_until(self, text: str) -> None:
        seen = b""
        while text.encode() not in seen:
            seen += os.read(self._master, 1024)

    def close(self) -> int:
        """Returns the process's exit code."""
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
