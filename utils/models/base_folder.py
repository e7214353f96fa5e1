"""A base model's folder and config.json, looked at before anything is loaded; no torch."""

from pathlib import Path

from utils.cli import UsageError
from utils.files import require_fetched, required_object


def model_folder(model_name: str) -> Path | None:
    """The folder of a local base model; None for a hub id.

    Raises:
        UsageError: there is no such folder, or it holds no model.
    """
    folder = Path(model_name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model_name.count("/") > 1:
            raise UsageError(f"no model at {model_name!r}: there is no such folder")
        return None
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model_name!r} is a folder without config.json, so it holds no model")
    require_fetched(folder)
    return folder


def read_config(model_name: str) -> dict | None:
    """The config.json of a base model that is here, in a folder or the hub's cache; else None.

    Raises:
        UsageError: it is not a JSON object, or see `model_folder`.
    """
    if Path(model_name).expanduser().exists():
        folder = model_folder(model_name)
        file = folder / "config.json" if folder else None
    else:
        file = _cached_config(model_name)
    return None if file is None else required_object(file, "restore the model's own")


def _cached_config(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

    if hub_id.count("/") != 1:
        return None
    cached = try_to_load_from_cache(hub_id, "config.json")
    return Path(cached) if isinstance(cached, str) else None
