"""Faults made for real: a disk that is small, a quota, a terminal that goes away."""

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
    return _mounted(["--user", "--map-root-user"], mount, [size, str(folder)], command)


def with_quota(folder, size: str, *command: str) -> subprocess.CompletedProcess:
    """Run a Python command in a folder of a quota of `size`, in a file system over `folder`.

    What is written there stays in a file next to it. Only root can do so.
    """
    mount = (
        'truncate -s 160M "$2.btrfs" && mkfs.btrfs -qf "$2.btrfs" && mount -o loop "$2.btrfs" "$2" '
        '&& cd "$2" && btrfs -q quota enable . && btrfs -q subvolume create disk '
        '&& btrfs -q qgroup limit "$1" disk && cd disk && shift 2 && exec "$@"'
    )
    return _mounted([], mount, [size, str(folder)], command)


def _mounted(
    namespaces: list[str], mount: str, places: list[str], command: tuple[str, ...]
) -> subprocess.CompletedProcess:
    """Run a Python command after a line of shell that mounts what it runs in, for it alone."""
    inside = ["unshare", *namespaces, "--mount", "sh", "-c", mount, "sh", *places]
    permitted = (
        shutil.which("unshare")
        and not subprocess.run([*inside, "true"], capture_output=True).returncode
    )
    if not permitted:
        pytest.skip("no such file system can be mounted here")
    return subprocess.run(
        [*inside, sys.executable, *command], env=ENVIRONMENT,
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
