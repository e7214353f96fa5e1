"""How many sequences fit on a device at once, found by trying."""

import resource
import sys
from collections.abc import Callable

import psutil
import torch

from utils.cli import UsageError

# What is used of the memory that there is; the rest is for fragmentation and for others.
USABLE_SHARE = 0.9
# Beyond this a device is busy, and larger microbatches gain nothing.
MOST_SEQUENCES = 64


def fitting_sequences(step: Callable[[int], None], device: torch.device) -> int:
    """The largest number of sequences whose step fits into the memory of `device`.

    Steps of one and of two sequences give the memory that each further one takes; on a GPU a step
    of what follows from that is tried, and fewer where it does not fit. (On a CPU that would wake
    the kernel's out-of-memory killer.)

    Args:
        step: does all that a microbatch of so many sequences of the greatest length will do.

    Returns:
        1 to `MOST_SEQUENCES`.

    Raises:
        UsageError: not even one fits.
    """
    try:
        first, second = (_peak_of(step, sequences, device) for sequences in (1, 2))
    except torch.OutOfMemoryError:
        raise UsageError(
            "--perdevice_bs auto: not two sequences fit into this device's memory; lower "
            "--max_seq_len, add --gradient_checkpointing, or give --perdevice_bs 1"
        ) from None
    each = max(1, second - first)
    count = 2 + int(USABLE_SHARE * _available(device) - (second - _in_use(device))) // each
    count = min(max(1, count), MOST_SEQUENCES)
    while device.type == "cuda" and count > 2:
        try:
            step(count)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            count = count * 7 // 8
    return count


def _peak_of(step: Callable[[int], None], sequences: int, device: torch.device) -> int:
    """Bytes in use at the height of a step. On a CPU they only ever grow, as the steps must."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(sequences)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _available(device: torch.device) -> int:
    """Bytes that this process could have beyond those in use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
