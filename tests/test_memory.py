"""How many sequences fit on a device."""

import pytest
import torch

import utils.memory
from utils.cli import UsageError
from utils.memory import MOST_SEQUENCES, fitting_sequences

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODEL, SEQUENCE = 1000, 50


class Device:
    """Stands in for a device: what a step of n sequences takes, and where it fails."""

    def __init__(self, monkeypatch, memory: int, truly_fits: int = 10**9):
        self.truly_fits, self.peak, self.tried = truly_fits, 0, []
        replacements = {
            "_peak_of": self.peak_of,
            "_in_use": lambda _device: MODEL,
            "_available": lambda _device: memory - MODEL,
        }
        for name, function in replacements.items():
            monkeypatch.setattr(utils.memory, name, function)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def step(self, sequences: int) -> None:
        self.tried.append(sequences)
        if sequences > self.truly_fits:
            raise torch.OutOfMemoryError

    def peak_of(self, step, sequences, _device) -> int:
        step(sequences)
        return MODEL + SEQUENCE * sequences


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


def test_memory_of_this_process_is_measured():
    kept = []

    def step(sequences: int) -> None:
        kept.append(torch.ones(sequences * 64 << 18))  # 64 MiB each

    before = utils.memory._in_use(CPU)
    peaks = [utils.memory._peak_of(step, sequences, CPU) for sequences in (1, 2)]
    assert peaks[0] >= before
    assert utils.memory._in_use(CPU) - before >= 180 << 20
    assert utils.memory._available(CPU) > 1 << 28
