"""A launched script that is asked to stop."""

import signal
import subprocess
import sys
import time

import pytest

from tests.paths import ROOT

SCRIPT = """
import time
from utils.runs.stopping import StopRequest
stop = StopRequest()
print("ready", flush=True)
deadline = time.monotonic() + 20
while not stop.requested and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.5)
print("saved", stop.signal_name, flush=True)
"""


def start(**options):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_whatever_follows_the_first_signal_the_work_is_saved(first):
    process = start()
    process.send_signal(signal.Signals[first])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        time.sleep(0.05)
        process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"saved {first}\n"
    assert process.returncode == 0


def test_nohup_is_respected():
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved SIGTERM\n"
