"""What the processes of one job share: agreement, sharded base weights, the loss of one of them."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from utils.cli import EXIT_USAGE, UsageError
from utils.devices import has_usable_accelerator
from utils.models.loading import share_cores
from utils.runs.stopping import launched_by_accelerate

Result = TypeVar("Result")


def make_accelerator(tracker: str | None, project_dir: Path) -> Accelerator:
    """Accelerate's state of this process.

    Args:
        tracker: a name that accelerate knows, or None.
        project_dir: where it may write.

    Raises:
        UsageError: the tracker's package is not installed.
    """
    # Without a GPU, processes find each other only where accelerate is told to use the CPU.
    cpu = not has_usable_accelerator()
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--report_to {tracker}: pip install {tracker}")
    accelerator = Accelerator(cpu=cpu, log_with=tracker, project_dir=project_dir)
    if cpu and launched_by_accelerate():
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return accelerator


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call `function` on the main process alone; every process gets its (picklable) result.

    Raises:
        UsageError: from `function`; the other processes exit with its code, so that the job says
            it once.
    """
    result: Result | None = None
    refusal: UsageError | None = None
    if PartialState().is_main_process:
        try:
            result = function()
        except UsageError as error:
            refusal = error
    result, refusal = broadcast_object_list([result, refusal])
    if refusal:
        _end_job(refusal)
    return cast(Result, result)


def require_same_on_every_rank(facts: Mapping[str, object]) -> None:
    """Refuse to begin where one rank would train something else than the others.

    Args:
        facts: what must agree, by the name that a refusal gives it. Values are compared and never
            shown, so hashes of private data may be among them.

    Raises:
        UsageError: names the first fact that differs, and the ranks.
    """
    first, *others = gather_object([facts])
    for name, value in first.items():
        differing = [rank for rank, other in enumerate(others, 1) if other.get(name) != value]
        if differing:
            ranks = ", ".join(map(str, differing))
            _end_job(
                UsageError(
                    f"rank {ranks} of this job has another {name} than rank 0; every machine needs "
                    "the same data set, base model, flags and versions of libraries"
                )
            )


def _end_job(error: UsageError) -> None:
    if PartialState().is_main_process:
        raise error
    sys.exit(EXIT_USAGE)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of the bytes of all tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def require_same_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Raise a RuntimeError unless `tensors` are the same, to the last bit, on every rank."""
    digests = gather_object([tensors_sha256(tensors)])
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise RuntimeError(
            f"the adapters of ranks {differing} differ from rank 0's: these processes no longer "
            "train one model; are their devices or libraries of different versions?"
        )


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Shard the frozen decoder layers over all processes with FSDP2, one layer after the other.

    A device never holds more than its shard, one whole layer, and what stays whole everywhere:
    the adapters, which remain ordinary tensors, and embeddings, norms and the head, since the
    chunked loss calls the head more often on one rank than on another. From here on every process
    has to make the same number of forward and of backward passes.

    Args:
        model: on the CPU, with its adapters attached.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    base = model.get_base_model()
    adapters = {tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    layers = [m for m in base.modules() if type(m).__name__ in set(base._no_split_modules or ())]
    if not layers:
        raise UsageError(f"--fsdp: {base.config.model_type} does not say what its layers are")
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    # The decoder as the root of all layers, with no tensor of its own: layers are then gathered
    # while the one before is computed.
    whole = {tensor for tensor in model.parameters() if not isinstance(tensor, DTensor)}
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)


def is_loss_of_a_rank(error: Exception) -> bool:
    """Whether an error says that another process of the job is gone."""
    return isinstance(error, DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
