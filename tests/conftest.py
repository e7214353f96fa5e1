"""Fixtures that every test may use: a random two-layer LLaMA with a byte-level tokenizer."""

import os
import signal
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from privacy_checks.composition import epsilon_over_steps
from privacy_checks.tiny_model import save_tiny_model
from query_gpt35_for_annotation.rate_limits import backoff
from tests.annotation_server import KEY

datasets.disable_progress_bars()
# Under nohup all that tests start would ignore it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Path (str) of a saved two-layer random LLaMA with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture
def private_modes(monkeypatch):
    """Under umask 0: the mode of every folder `private` at the moment when it is made."""
    modes, make = [], os.mkdir

    def watched(path, *args, **options):
        make(path, *args, **options)
        if Path(path).name == "private":
            modes.append(oct(os.stat(path).st_mode & 0o777))

    monkeypatch.setattr(os, "mkdir", watched)
    before = os.umask(0)
    yield modes
    os.umask(before)


@pytest.fixture
def key(monkeypatch):
    """The key of an annotation server, in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def quick(monkeypatch):
    """Pauses of a twentieth, so that a test of many retries takes seconds."""
    monkeypatch.setattr(
        "query_gpt35_for_annotation.client.backoff", lambda *given: backoff(*given) / 20
    )


@pytest.fixture
def short_curves(monkeypatch):
    """Composed reports take epsilon at three steps, where what is tested is not its curve."""
    curve = partial(epsilon_over_steps, points=3)
    monkeypatch.setattr("privacy_checks.report.epsilon_over_steps", curve)
