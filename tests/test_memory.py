"""How many sequences fit on a device."""

import os
import time
from unittest import mock

import pytest
import torch

import utils.models.memory
from utils.cli import UsageError
from utils.models.memory import (
    ALLOCATOR_VARIABLES,
    MOST_SEQUENCES,
    PeakMemory,
    fitting_sequences,
    use_expandable_segments,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODEL, SEQUENCE = 1000, 50


class Device:
    """Stands in for a device: what a step of n sequences takes, and where it fails."""

    def __init__(self, monkeypatch, memory: int, truly_fits: int = 10**9):
        self.truly_fits, self.tried = truly_fits, []
        monkeypatch.setattr(utils.models.memory, "PeakMemory", lambda _device: self)
        monkeypatch.setattr(utils.models.memory, "_in_use", lambda _device: MODEL)
        monkeypatch.setattr(utils.models.memory, "_available", lambda _device: memory - MODEL)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def step(self, sequences: int) -> None:
        self.tried.append(sequences)
        if sequences > self.truly_fits:
            raise torch.OutOfMemoryError
        self.peak = MODEL + SEQUENCE * sequences

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("memory", [1400, 2000, 3000])
def test_the_largest_number_that_leaves_a_reserve(monkeypatch, memory):
    device = Device(monkeypatch, memory)
    count = fitting_sequences(device.step, CPU)
    reserve = 0.9 * (memory - MODEL)
    assert SEQUENCE * count <= reserve < SEQUENCE * (count + 1)
    assert device.tried == [1, 2]  # nothing larger is tried where that could kill the process


def test_a_gpu_tries_what_it_has_found_and_takes_less_where_that_fails(monkeypatch):
    device = Device(monkeypatch, 3000, truly_fits=20)
    assert fitting_sequences(device.step, GPU) == 20
    assert device.tried[:3] == [1, 2, 36]


def test_more_than_keeps_a_device_busy_is_not_used(monkeypatch):
    assert fitting_sequences(Device(monkeypatch, 10**6).step, CPU) == MOST_SEQUENCES


def test_one_where_two_are_too_many_and_none_is_an_error(monkeypatch):
    assert fitting_sequences(Device(monkeypatch, MODEL + 60).step, CPU) == 1
    device = Device(monkeypatch, 3000, truly_fits=1)
    with pytest.raises(UsageError, match="--gradient_checkpointing"):
        fitting_sequences(device.step, GPU)


def test_the_peak_of_a_block_is_measured_though_it_was_higher_before():
    def work(mebibytes: int) -> None:
        tensor = torch.ones(mebibytes << 18)
        time.sleep(0.05)
        del tensor

    peaks = []
    for mebibytes in (600, 100, 300):
        before = utils.models.memory._in_use(CPU)
        with PeakMemory(CPU) as memory:
            work(mebibytes)
        peaks.append((memory.peak - before) / 2**20)
    assert [round(peak, -2) for peak in peaks] == [600, 100, 300]
    assert utils.models.memory._available(CPU) > 1 << 28


@pytest.mark.parametrize("given", [None, *ALLOCATOR_VARIABLES])
@pytest.mark.parametrize(
    ("platform", "cuda"), [("linux", "13.0"), ("linux", None), ("win32", "13")]
)
def test_segments_are_expandable_where_there_are_such_and_the_user_said_nothing(
    monkeypatch, given, platform, cuda
):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    monkeypatch.setattr(utils.models.memory.sys, "platform", platform)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with mock.patch.dict(os.environ):
        use_expandable_segments()
        found = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}
    if given:
        assert found == {given: "max_split_size_mb:512"}
    elif (platform, cuda) == ("linux", "13.0"):
        assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    else:
        assert found == {}
