"""Versions on record."""

import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from utils.versions import versions_of


def test_python_and_the_packages_asked_for():
    python = ".".join(map(str, sys.version_info[:3]))
    assert versions_of(["numpy"]) == {"python": python, "numpy": np.__version__}
    with pytest.raises(PackageNotFoundError):
        versions_of(["no-such-package"])
