"""What travels with an adapter next to its weights: prompt style and base model; no torch."""

import json
import os
from pathlib import Path

from utils.cli import UsageError
from utils.files import write_json

TRAINING_STYLE_FILE = "training_style.json"


def write_adapter_info(folder: str | os.PathLike, info: dict) -> None:
    """Leave next to an adapter what sampling must know: the prompt style and the base model."""
    write_json(Path(folder) / TRAINING_STYLE_FILE, info)


def read_adapter_info(folder: str | os.PathLike) -> dict:
    """What training left next to an adapter; an empty dict for an adapter from elsewhere.

    Raises:
        UsageError: the folder holds no PEFT adapter.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"no adapter at {str(folder)!r}: adapter_config.json is missing; training writes "
            "one to outputs/JOB_SESS/adapter"
        )
    style = folder / TRAINING_STYLE_FILE
    return json.loads(style.read_text()) if style.is_file() else {}
