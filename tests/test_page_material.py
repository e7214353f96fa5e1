"""What is read for a page: damage is named, and defects are not hidden."""

from pathlib import Path

import pytest

from evaluation.page.material import damage_named
from utils.cli import UsageError


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), TypeError("x"), OSError("x")])
def test_damage_is_named_and_defects_are_not_hidden(error):
    with (
        pytest.raises(UsageError, match="^file is missing or not what train.py writes"),
        damage_named(Path("file"), "train.py"),
    ):
        raise error
    with pytest.raises(ZeroDivisionError), damage_named(Path("file"), "train.py"):
        raise ZeroDivisionError
