"""Devices as they are: whether one can do all that is needed, and copies that it need not wait for.

Imports nothing of the project.
"""

import torch


def has_usable_accelerator() -> bool:
    """Whether this machine has an accelerator that has float64, in which norms and noise add up.

    A Mac's GPU has none: a Mac computes on its CPU.
    """
    if not torch.accelerator.is_available():
        return False
    accelerator = torch.accelerator.current_accelerator()
    # A tensor on it would make a context on the first of several GPUs, in every process.
    if accelerator.type == "cuda":
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=accelerator)
    except (TypeError, RuntimeError):
        return False
    return True


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of a tensor of the CPU, for a GPU out of pinned memory.

    Neither waits for the other: the copy is made in the order of the GPU's work, and the pinned
    memory is used again only once it is done.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
