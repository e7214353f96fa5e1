"""Versions on record: of Python and of what a result may depend on."""

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of installed packages, by their names."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def toolkit_commit() -> str:
    """The commit of this toolkit, with "-dirty" where its files differ; "" outside of its clone."""
    if not (ROOT / ".git").exists():  # a repository around it would name another commit
        return ""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
