"""How everything is measured: by turns, in processes of their own, by one clock."""

import subprocess
import time
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch

from benchmarks.environments import ROOT
from utils.cli import UsageError, say

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes, with all that it left the GPU to do."""
    began = time.perf_counter()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def by_turns(
    names: Iterable[Name], measure: Callable[[Name], Result], rounds: int
) -> dict[Name, list[Result]]:
    """Measure each once a round, so that a machine that slows down slows all of them."""
    results: dict[Name, list[Result]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name, found in results.items():
            say(f"round {number} of {rounds}: {name}")
            found.append(measure(name))
    return results


def output_of(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """What a command prints on stdout; it runs in the repository's root.

    Raises:
        UsageError: it failed; the end of its stderr says why.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UsageError(f"{what} failed: {' | '.join(done.stderr[-2000:].splitlines())}")
    return done.stdout
