"""Studies of benchmarks/ without a process for every command."""

import importlib
from pathlib import Path

from tests.training import in_process

TEXTS = [f"{a}{b} {c}" for a in "abcdef" for b in "abcdef" for c in "abcd"]
# Names of the commands that were run, as their logs have them.
ran: list[str] = []


def run_here(command, log) -> int:
    """`studies.run_command` in this process."""
    module, *arguments = command[1:] if command[0] == "-m" else command
    main = importlib.import_module(module.removesuffix(".py")).main
    ran.append(Path(log.name).stem)
    return in_process(main, arguments)


def one_by_one(jobs, step, items) -> None:
    """`studies.side_by_side` without threads: signal handlers belong to the main one."""
    for item in items:
        step(item)
