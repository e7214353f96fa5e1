"""Training with a defect, for tests of what is meant to notice it."""

import sys
import types

from privacy_checks import observed_run
from tests.paths import ROOT
from utils.privacy import mechanism


def observe_mutated_training(monkeypatch, old: str, new: str) -> None:
    """Let runs be observed in which `old`, found once in train.py or mechanism.py, reads `new`."""
    sources = {name: (ROOT / name).read_text() for name in ("train.py", MECHANISM)}
    (place,) = (name for name, source in sources.items() if old in source)
    assert sources[place].count(old) == 1
    module = types.ModuleType("mutated_script")
    # The classes of a module that is not registered cannot be made.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(sources[place].replace(old, new), place, "exec"), module.__dict__)
    if place == MECHANISM:
        for name, method in vars(module.Private).items():
            if isinstance(method, types.FunctionType):
                monkeypatch.setattr(mechanism.Private, name, method)
    else:
        monkeypatch.setattr(observed_run, "train", module)


MECHANISM = "utils/privacy/mechanism.py"
