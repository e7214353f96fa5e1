"""Virtual environments for what is compared with, so that its pins never meet the toolkit's."""

import subprocess
import sys
import zlib
from pathlib import Path

from utils.cli import UsageError, say

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".benchmark-environments"


# vLLM asks for these, and texts need none of them. PyPI's are built for CUDA and do not import
# next to a CPU build of torch, which keeps transformers, and so vLLM, from importing.
VLLM_DOES_WITHOUT = ("torchvision", "torchaudio", "torchcodec")


def vllm_python() -> Path:
    """The Python of an environment with a CPU build of vLLM."""
    return python_with(ROOT / "benchmarks" / "requirements-vllm.txt", without=VLLM_DOES_WITHOUT)


def python_with(requirements: Path, without: tuple[str, ...] = ()) -> Path:
    """The Python of an environment that holds `requirements`; made on the first call.

    Args:
        requirements: a pip requirements file; its contents name the environment, so a changed
            file gets a new one.
        without: packages that others ask for, to be taken out again.

    Raises:
        UsageError: pip could not install it; its own lines say why.
    """
    digest = zlib.crc32(requirements.read_bytes())
    folder = ENVIRONMENTS / f"{requirements.stem}-{digest:08x}"
    python, installed = folder / "bin" / "python", folder / ".installed"
    if installed.exists():
        return python
    say(f"installing {requirements} into {folder}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(requirements)]]
    if without:
        commands.append([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without])
    for command in commands:
        if subprocess.run(command, check=False).returncode:
            raise UsageError(f"could not install {requirements}; the lines above say why")
    installed.touch()
    return python
