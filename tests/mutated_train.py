"""A `train.py` with a defect, for tests of what is meant to notice it."""

import sys
import types

from privacy_checks import observed_run
from tests.training import ROOT


def observe_mutated_train(monkeypatch, old: str, new: str) -> None:
    """Let runs be observed of a `train.py` in which `old`, found once, reads `new`."""
    source = (ROOT / "train.py").read_text()
    assert source.count(old) == 1
    module = types.ModuleType("mutated_train_script")
    # The classes of a module that is not registered cannot be made.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(old, new), "train.py", "exec"), module.__dict__)
    monkeypatch.setattr(observed_run, "train", module)
