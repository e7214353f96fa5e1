"""Versions on record: of Python and of what a result may depend on."""

import platform
from collections.abc import Iterable
from importlib.metadata import version


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of installed packages, by their names."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
