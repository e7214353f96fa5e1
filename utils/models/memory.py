"""How much memory work takes at its height, and how many sequences fit on a device."""

import os
import sys
import threading
from collections.abc import Callable

import psutil
import torch

from utils.cli import UsageError
from utils.models.footprint import USABLE_SHARE

# Beyond this a device is busy, and larger microbatches gain nothing.
MOST_SEQUENCES = 64
SAMPLE_SECONDS = 0.002
# Where users set up the allocator of GPUs: of this and of earlier versions of torch.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def use_expandable_segments() -> None:
    """Let the allocator of NVIDIA's GPUs extend what it has, before anything is on a GPU.

    Microbatches of many shapes otherwise leave holes that none of the next ones fits into. What the
    user has set up stands.
    """
    has_them = sys.platform == "linux" and torch.version.cuda is not None
    if has_them and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


class PeakMemory:
    """Measures the most bytes in use on `device` while its block runs, as `peak`.

    On a GPU what torch has allocated. On a CPU the process's resident memory, looked at every two
    milliseconds: the system's own high-water mark would keep that of earlier work.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._ended = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._ended.set()
            self._watcher.join()

    def _watch(self) -> None:
        process, ended = psutil.Process(), False
        while not ended:
            ended = self._ended.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, process.memory_info().rss)


def fitting_sequences(step: Callable[[int], None], device: torch.device) -> int:
    """The largest number of sequences whose step fits into the memory of `device`.

    Steps of one and of two sequences give the memory that each further one takes; on a GPU a step
    of what follows from that is tried, and fewer where it does not fit. (On a CPU that would wake
    the kernel's out-of-memory killer.)

    Args:
        step: does all that microbatches will do which take as much as so many sequences of the
            greatest length.

    Returns:
        1 to `MOST_SEQUENCES`.

    Raises:
        UsageError: not even two fit.
    """
    peaks = []
    try:
        for sequences in (1, 2):
            with PeakMemory(device) as memory:
                step(sequences)
            peaks.append(memory.peak)
    except torch.OutOfMemoryError:
        raise UsageError(
            "--perdevice_bs auto: not two sequences fit into this device's memory; lower "
            "--max_seq_len, add --gradient_checkpointing, or give --perdevice_bs 1"
        ) from None
    each = max(1, peaks[1] - peaks[0])
    left = USABLE_SHARE * _available(device) - (peaks[1] - _in_use(device))
    count = min(max(1, 2 + int(left // each)), MOST_SEQUENCES)
    while device.type == "cuda" and count > 2:
        try:
            step(count)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            count = count * 7 // 8
    return count


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
