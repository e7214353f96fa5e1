"""A pretend CUDA device: whole runs of the real scripts, without a GPU.

    PRETEND_CUDA=1 python -m pytest -m gpu

Its tensors say that they are on `cuda:0` and hold real values, which the CPU computes: losses,
gradients and texts are real ones. It does what goes wrong on a GPU and on no CPU:

- it raises where an operation mixes tensors of both devices;
- it counts kernels, and synchronisations by the file and line that make the CPU wait for the GPU,
  and tells of them as `torch.cuda.set_sync_debug_mode` does;
- it has so much memory and no more, and raises torch's own error where that is spent.

It knows one device with one stream. Not covered: timing and races, NCCL and FSDP, CUDA graphs,
bitsandbytes' kernels, the fragmentation of real memory, the rounding of real kernels.

`driver.cpp` satisfies libtorch, `device.py` is the tensor and what counts. As libtorch asks for its
driver once, `install` comes before torch is imported.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from tests.paths import ROOT

DRIVER = Path(__file__).with_name("driver.cpp")


def missing() -> str | None:
    """Why there can be no pretend device on this machine, if so."""
    return None if shutil.which("g++") else "the pretend CUDA device needs a C++ compiler (g++)"


def build() -> Path:
    """The compiled driver, made once for each release of torch."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(DRIVER.read_bytes() + version.encode()).hexdigest()[:16]
    library = ROOT / ".pytest_cache" / f"pretend-cuda-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        torch = Path(importlib.util.find_spec("torch").origin).parent
        partial = library.with_suffix(f".{os.getpid()}")
        command = [
            "g++", "-shared", "-fPIC", "-std=c++20", str(DRIVER), "-o", str(partial),
            f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10",
            f"-Wl,-rpath,{torch / 'lib'}",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


def install() -> None:
    """Give this process a pretend device, before it imports torch."""
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    from tests.pretend_cuda import device

    device.install()
