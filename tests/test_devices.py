"""What a device must have, and copies to it."""

import pytest
import torch

from utils.devices import has_usable_accelerator, to_device


@pytest.mark.parametrize(("device", "has_float64"), [("mps", False), ("xpu", True), ("cuda", None)])
def test_an_accelerator_without_float64_is_not_used(device, has_float64, monkeypatch):
    def zeros(*size, dtype, device):
        assert device.type != "cuda", "a tensor makes a context on the first GPU in every process"
        if not has_float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))
    monkeypatch.setattr(torch, "zeros", zeros)
    assert has_usable_accelerator() == (has_float64 is not False)


def test_a_machine_without_one_has_none():
    if not torch.accelerator.is_available():
        assert not has_usable_accelerator()


def test_on_a_cpu_a_tensor_stays_what_it_is():
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
