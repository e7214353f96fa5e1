"""Studies of benchmarks/ without a process for every command."""

import importlib
from pathlib import Path

from tests.training import in_process
from utils.files import write_json

TEXTS = [f"{a}{b} {c}" for a in "abcdef" for b in "abcdef" for c in "abcd"]
# Names of the commands that were run.
ran: list[str] = []


def run_here_once(folder: Path, name: str, *command: str) -> None:
    """`studies.run_once` in this process."""
    finished = folder / "times" / f"{name.replace(' ', '-')}.json"
    if finished.exists():
        return
    module = command[1] if command[0] == "-m" else command[0].removesuffix(".py")
    arguments = list(command[2:] if command[0] == "-m" else command[1:])
    assert in_process(importlib.import_module(module).main, arguments) == 0, name
    ran.append(name)
    write_json(finished, 1.0)


def one_by_one(jobs, step, items) -> None:
    """`studies.side_by_side` without threads: signal handlers belong to the main one."""
    for item in items:
        step(item)
