"""Fixtures that every test may use: a random two-layer LLaMA with a byte-level tokenizer."""

import functools
import os
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch

from privacy_checks.tiny_model import save_tiny_model
from query_gpt35_for_annotation.rate_limits import backoff
from tests.annotation_server import KEY
from utils.privacy import guarantee, plan
from utils.privacy.accounting import compute_delta

datasets.disable_progress_bars()


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


@pytest.fixture(scope="session", autouse=True)
def accountant_that_remembers():
    """Plans and reports ask the real accountant, but only once a session for the same question."""

    def remembering(compute):
        remembered = functools.cache(compute)
        return lambda *given: remembered(
            *(tuple(each) if isinstance(each, list) else each for each in given)
        )

    calibrate = remembering(plan.calibrate_noise_multiplier)
    epsilon, bounds = remembering(plan.compute_epsilon), remembering(guarantee.epsilon_bounds)
    with (
        mock.patch.object(plan, "compute_epsilon", epsilon),
        mock.patch.object(guarantee, "compute_epsilon", epsilon),
        mock.patch.object(guarantee, "epsilon_bounds", bounds),
        mock.patch.object(guarantee, "group_epsilons", remembering(guarantee.group_epsilons)),
        mock.patch.object(plan, "calibrate_noise_multiplier", calibrate),
    ):
        yield


@pytest.fixture(scope="module")
def composition_that_remembers(accountant_that_remembers):
    """Composed reports and pages ask the real accountant, but only once for the same question."""
    from evaluation.page import material
    from privacy_checks import composition

    remembered = functools.cache(lambda events, *rest: compute_delta(list(events), *rest))

    def delta(events, *rest):
        return remembered(tuple(events), *rest)

    epsilons = {name: getattr(guarantee, name) for name in ("compute_epsilon", "epsilon_bounds")}
    with (
        mock.patch.multiple(composition, compute_delta=delta, **epsilons),
        mock.patch.object(material, "compute_delta", delta),
    ):
        yield
