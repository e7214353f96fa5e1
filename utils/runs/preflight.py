"""What would stop a run, or quietly spoil it, seen before its work begins.

Whatever needs no weights is looked at on a skeleton: the model that the run will use, on the meta
device. No torch is imported here, so that the generators can look at what they see of it.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UsageError
from utils.models.base_folder import model_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")
# Tables of positions, which end where a rotation would go on.
_TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)(\.|$)")


def visible_gpus() -> int | None:
    """NVIDIA's GPUs that a process started here may use; None where no driver tells."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not GPUS_OF_THE_DRIVER.is_dir():
        return None
    installed = sum(1 for _ in GPUS_OF_THE_DRIVER.iterdir())
    return installed if chosen is None else min(installed, len(chosen.split(",")) if chosen else 0)


def require_gpus(processes: int, visible: int | None) -> None:
    """Refuse more processes than this machine has GPUs; one without any runs them on its CPU.

    Args:
        processes: on this machine.
        visible: GPUs; None or 0 for none.

    Raises:
        UsageError: says how many there are.
    """
    if visible and processes > visible:
        raise UsageError(
            f"--gpus {processes}, but this machine has {visible} that may be used (the variable "
            f"CUDA_VISIBLE_DEVICES can hide some); use --gpus {visible}"
        )


def check_here(model_name: str, processes: int, *, must: bool) -> list[str]:
    """What a generator sees of the machine that it is on.

    Args:
        must: whether the command runs here; it may run elsewhere if not.

    Returns:
        Warnings, one line each.

    Raises:
        UsageError: the model's folder holds no model; or, if `must`, it is missing, or there are
            fewer GPUs than processes.
    """
    try:
        require_gpus(processes, visible_gpus())
        if not Path(model_name).expanduser().exists():
            model_folder(model_name)
    except UsageError as error:
        if must:
            raise
        return [f"{error}; or run the command where it fits"]
    model_folder(model_name)
    return []


def embedding_rows(model: "PreTrainedModel") -> int:
    """Token ids that a model has a row for, from 0."""
    return model.get_input_embeddings().weight.shape[0]


def require_vocabulary(rows: int, tokenizer: "PreTrainedTokenizerBase", largest_id: int) -> None:
    """Refuse token ids that the embedding has no row for: a GPU would end in an assertion.

    Args:
        rows: of the embedding.
        largest_id: of the tokens that will pass.

    Raises:
        UsageError: names the id, and what it is.
    """
    ids = {"padding": tokenizer.pad_token_id, "end-of-sequence": tokenizer.eos_token_id}
    ids |= {"beginning-of-sequence": tokenizer.bos_token_id, "largest": largest_id}
    for what, number in ids.items():
        if number is not None and not 0 <= number < rows:
            token = tokenizer.convert_ids_to_tokens(number)
            remedy = (
                f'set "pad_token" to {tokenizer.eos_token!r} in tokenizer_config.json'
                if what == "padding"
                else "use the tokenizer that belongs to this model"
            )
            raise UsageError(
                f"the {what} token {token!r} has the id {number}, but the model's embedding has "
                f"{rows} rows, up to id {rows - 1}; {remedy}"
            )


def trained_positions(config: "PretrainedConfig") -> int | None:
    """Positions that a base was trained with, or stretched to; None where it does not say."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    for each in sets if positions else []:
        if isinstance(each, Mapping) and each.get("original_max_position_embeddings"):
            stretched = each["original_max_position_embeddings"] * (each.get("factor") or 1)
            positions = max(positions or 0, int(stretched))
    return positions


def check_positions(model: "PreTrainedModel", max_seq_len: int) -> list[str]:
    """Refuse sequences that are longer than a base's table of positions.

    Returns:
        A warning where the base was trained with fewer positions, but can go on.

    Raises:
        UsageError: names the flag and the longest length.
    """
    positions = trained_positions(model.config)
    if positions is None or max_seq_len <= positions:
        return []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(_TABLES.search(name) for name, _ in tensors):
        raise UsageError(
            f"--max_seq_len {max_seq_len}, but {model.config.model_type} has a table of "
            f"{positions} positions; use --max_seq_len {positions} or less"
        )
    return [
        f"--max_seq_len {max_seq_len} goes beyond the {positions} positions that this base was "
        "trained with"
    ]


def require_room(folder: Path, size: int) -> None:
    """Take so many bytes of disk for a moment, which finds out about quotas and limits too.

    Args:
        folder: that is there; nothing stays in it.

    Raises:
        OSError: they cannot be had, or nothing can be written; names folder and size.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # not on a Mac
                os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        needed = f"the run needs {size / 1e6:,.1f} MB"
        raise OSError(error.errno, f"{error.strerror}, {needed}", str(folder)) from None
