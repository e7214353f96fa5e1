"""Virtual environments for what is compared with, so that its pins never meet the toolkit's."""

import subprocess
import sys
import zlib
from pathlib import Path

from utils.cli import UsageError, say

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".benchmark-environments"


def python_with(requirements: Path) -> Path:
    """The Python of an environment that holds `requirements`; made on the first call.

    Args:
        requirements: a pip requirements file; its contents name the environment, so a changed
            file gets a new one.

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
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(requirements)]):
        if subprocess.run(command, check=False).returncode:
            raise UsageError(f"could not install {requirements}; the lines above say why")
    installed.touch()
    return python
