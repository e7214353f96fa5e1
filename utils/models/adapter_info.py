"""What travels with an adapter next to its weights: prompt style and base model; no torch."""

import hashlib
import os
from pathlib import Path

from utils.cli import UsageError
from utils.files import require_fetched, required_object, sha256_of, write_json

TRAINING_STYLE_FILE = "training_style.json"
KIND = "LORA"
# What an adapter is: `adapter_sha256` covers these.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_adapter_info(folder: str | os.PathLike, info: dict) -> None:
    """Leave next to an adapter what sampling must know: the prompt style and the base model."""
    write_json(Path(folder) / TRAINING_STYLE_FILE, info)


def adapter_sha256(folder: str | os.PathLike) -> str:
    """One hash of an adapter's weights and configuration.

    The same as `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` in `folder`.

    Raises:
        UsageError: one of the two is missing.
    """
    folder = Path(folder)
    try:
        lines = [f"{sha256_of(folder / name)}  {name}\n" for name in ADAPTER_FILES]
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is missing; restore the run's own adapter/") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_adapter_info(folder: str | os.PathLike) -> dict:
    """What training left next to an adapter; an empty dict for an adapter from elsewhere.

    Raises:
        UsageError: the folder holds no PEFT adapter, or one of another kind than LoRA.
    """
    folder = Path(folder)
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise UsageError(
            f"no adapter at {str(folder)!r}: adapter_config.json is missing; training writes "
            "one to outputs/JOB_SESS/adapter"
        )
    require_fetched(folder)
    kind = required_object(config_file, "restore the adapter's own").get("peft_type")
    if kind != KIND:
        raise UsageError(
            f"{config_file} is of an adapter of the kind {str(kind)[:40]!r}; use one of {KIND!r}"
        )
    style = folder / TRAINING_STYLE_FILE
    return required_object(style, "restore the adapter's own") if style.is_file() else {}
