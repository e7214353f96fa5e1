"""The pretend device's tensors, what they count, and torch.cuda's functions on it."""

import collections
import contextlib
import sys
import threading
import types
import warnings

import torch
from torch.nn.attention import SDPBackend
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.paths import ROOT

DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

# Operations that cannot end before the CPU knows a value, or how many there are.
WAITS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
# Those that start no kernel.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
             "lift_fresh", "_local_scalar_dense", "is_same_size"}  # fmt: skip
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}


class Counts:
    """What the device did.

    Attributes:
        kernels: by operation.
        synchronisations: by "file:line operation", the line of this repository that waited.
    """

    def __init__(self):
        self.kernels: collections.Counter[str] = collections.Counter()
        self.synchronisations: collections.Counter[str] = collections.Counter()
        self.warns = False

    def wait(self, operation: str) -> None:
        """The CPU waits for the device."""
        file, line = _line_of_the_repository()
        self.synchronisations[f"{file}:{line} {operation}"] += 1
        if self.warns:
            text = f"called a synchronizing CUDA operation: {operation}"
            warnings.warn_explicit(text, UserWarning, str(ROOT / file), line)


class Memory:
    """Bytes in use, by tensors that share them, of at most `capacity`."""

    def __init__(self, total: int):
        self.total = self.capacity = total
        self.used = self.peak = 0
        self._users: collections.Counter[int] = collections.Counter()

    def take(self, place: int, size: int) -> None:
        self._users[place] += 1
        if self._users[place] == 1:
            self.used += size
            self.peak = max(self.peak, self.used)

    def give_back(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.used -= size

    def require_room(self) -> None:
        if self.used > self.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory: {self.used} bytes of {self.capacity} (pretend)"
            )


counts, memory = Counts(), Memory(80 << 30)


class Share:
    """A tensor's part in its storage, until the tensor goes."""

    def __init__(self, storage: torch.UntypedStorage):
        self._place, self._size = storage.data_ptr(), storage.nbytes()
        memory.take(self._place, self._size)

    def __del__(self):
        memory.give_back(self._place, self._size)


class PretendTensor(torch.Tensor):
    """Says that it is on the device; `inner` holds its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor):
        self.inner = inner
        self._share = Share(inner.untyped_storage())

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def record_stream(self, stream):
        pass

    def __repr__(self):
        return f"{self.inner!r} on {DEVICE}"

    def __reduce_ex__(self, protocol):
        """Saved as what it holds."""
        return self.detach().cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied


class PretendDevice(TorchDispatchMode):
    """Sees every operation, so that tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args: tuple, kwargs: dict):
    """Do one operation: on the CPU, for whichever device it is asked of."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    own = [tensor for tensor in given if isinstance(tensor, PretendTensor)]
    name = func._schema.name.split("::")[1]
    wanted = _device_of(args, kwargs)
    if not own and (wanted is None or wanted.type != "cuda"):
        return func(*args, **kwargs)
    if name == "_fused_sdp_choice":
        masked = len(args) > 3 and args[3] is not None
        return (SDPBackend.MATH if masked else SDPBackend.FLASH_ATTENTION).value
    _require_one_device(name, given, own)
    _notice_waiting(name, args, kwargs, own, wanted)
    function = KERNELS.get(func, func)
    inner_kwargs = {key: _mapped(_inner, value) for key, value in kwargs.items()}
    result = function(*_mapped(_inner, args), **inner_kwargs)
    if wanted is not None and wanted.type == "cpu" and own:
        return result
    if name not in NO_KERNEL and not _is_view(func):
        counts.kernels[name] += 1
    before = {id(tensor.inner): tensor for tensor in own}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        known = before.get(id(value))
        return PretendTensor(value) if known is None else known

    outputs = _mapped(wrapped, result)
    memory.require_room()
    return outputs if name != "copy_" else args[0]


def _mapped(change, value):
    """A value, or all in a list or tuple of them, changed."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, each) for each in value)
    return change(value)


def _inner(value):
    if isinstance(value, PretendTensor):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


def _device_of(args: tuple, kwargs: dict) -> torch.device | None:
    """The device that an operation is told to put its result on."""
    named = [kwargs.get("device"), *args]
    return next((each for each in named if isinstance(each, torch.device)), None)


def _is_view(func) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _require_one_device(name: str, given: list, own: list) -> None:
    """As CUDA does: numbers, copies and indices of the CPU are let through."""
    foreign = [tensor for tensor in given if not isinstance(tensor, PretendTensor)]
    if name in ("_to_copy", "copy_") or not own or all(tensor.dim() == 0 for tensor in foreign):
        return
    if name in INDEXED and isinstance(given[0], PretendTensor):
        foreign = [tensor for tensor in foreign if tensor.dtype.is_floating_point]
    if foreign:
        shapes = [list(tensor.shape) for tensor in foreign]
        file, line = _line_of_the_repository()
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name} of "
            f"a tensor {shapes[0]} of the CPU, in {file}:{line}"
        )


def _notice_waiting(
    name: str, args: tuple, kwargs: dict, own: list, wanted: torch.device | None
) -> None:
    """Count the operation, if the CPU waits for its end."""
    unknown = name == "repeat_interleave" and kwargs.get("output_size") is None
    if own and (name in WAITS or unknown):
        counts.wait(name)
    elif name == "_to_copy" or name == "copy_":
        target, source = (args[0], args[1]) if name == "copy_" else (wanted, args[0])
        to_device = isinstance(target, PretendTensor) or (
            isinstance(target, torch.device) and target.type == "cuda"
        )
        if name == "_to_copy" and wanted is None:
            return
        if to_device != isinstance(source, PretendTensor):
            pinned = not to_device or getattr(source, "is_pretend_pinned", False)
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not (pinned and asynchronous):
                counts.wait("copy to the device" if to_device else "copy to the CPU")
    elif name in INDEXED and own:
        indices = [index for index in args[1] if index is not None]
        kinds = {index.dtype in (torch.bool, torch.uint8) for index in indices}
        fills = name != "index" and len(args) > 2 and args[2].numel() == 1 and kinds == {True}
        if True in kinds and not fills:
            counts.wait("index by a mask")
        if any(not isinstance(index, PretendTensor) for index in indices):
            counts.wait("index from the CPU")


def _line_of_the_repository() -> tuple[str, int]:
    """The innermost line that is being executed of a file that is not a library's, or this one."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and "site-packages" not in file and file != __file__:
            return file.removeprefix(f"{ROOT}/"), frame.f_lineno
        frame = frame.f_back
    return "libtorch", 0


# ------------------------------------------------------------------------ kernels


def _flash(query, key, value, dropout=0.0, causal=False, _mask=False, *, scale=None):
    output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, scale=scale
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    length, keys = query.shape[2], key.shape[2]
    return output, logsumexp, None, None, length, keys, nothing, nothing.clone(), nothing.clone()


def _flash_backward(
    gradient, query, key, value, output, logsumexp, _starts, _key_starts, _most, _most_keys,
    dropout, causal, _seed, _offset, *, scale=None,
):  # fmt: skip
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, logsumexp, dropout, causal, scale=scale
    )


# What the CPU has under another name.
KERNELS = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten.bmm.dtype: lambda first, second, dtype: aten.bmm(first.to(dtype), second.to(dtype)),
}

# ------------------------------------------------------------------------ torch.cuda


class PretendStream:
    """The one stream: what is asked of it is done already."""

    def __init__(self, device=None, priority=0):
        self.device = DEVICE

    def synchronize(self):
        counts.wait("Stream.synchronize")

    def record_event(self, event=None):
        return event or PretendEvent()

    def wait_event(self, event):
        pass

    wait_stream = wait_event


class PretendEvent:
    """What it waits for has happened."""

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        counts.wait("Event.synchronize")


def _pinned(tensor: torch.Tensor, device=None) -> torch.Tensor:
    copied = tensor.clone()
    copied.is_pretend_pinned = True
    return copied


def _set_fraction(fraction: float, device=None) -> None:
    memory.capacity = int(fraction * memory.total)


def _reset_peak(device=None) -> None:
    memory.peak = memory.used


def _warn_of_waiting(mode: str | int) -> None:
    counts.warns = mode not in ("default", 0)


def _run_on_device(thread: threading.Thread) -> None:
    with PretendDevice():
        _copy_what_is_made_of_values()
        _run_thread(thread)


def _copy_what_is_made_of_values() -> None:
    """Let `torch.tensor(values, device="cuda")` make them on the CPU, in this thread."""
    torch._C._set_only_lift_cpu_tensors(True)


_run_thread = threading.Thread.run
_properties = types.SimpleNamespace(
    name="Pretend A100", major=8, minor=0, total_memory=memory.total, multi_processor_count=108
)
_no_state = torch.zeros(16, dtype=torch.uint8)

CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "synchronize": lambda device=None: counts.wait("synchronize"),
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: _properties.name,
    "get_device_capability": lambda device=None: (_properties.major, _properties.minor),
    "get_device_properties": lambda device=None: _properties,
    "mem_get_info": lambda device=None: (memory.capacity - memory.used, memory.total),
    "memory_allocated": lambda device=None: memory.used,
    "memory_reserved": lambda device=None: memory.used,
    "max_memory_allocated": lambda device=None: memory.peak,
    "reset_peak_memory_stats": _reset_peak,
    "set_per_process_memory_fraction": _set_fraction,
    "set_sync_debug_mode": _warn_of_waiting,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: _no_state,
    "set_rng_state": lambda state, device=None: None,
    "get_rng_state_all": lambda: [_no_state],
    "set_rng_state_all": lambda states: None,
    "Stream": PretendStream,
    "Event": PretendEvent,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: PretendStream(),
}


def install() -> None:
    """Let torch, and every thread of this process, see the device."""
    # Libraries that look for a real driver find none, before torch says that there is one.
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401
    for name, function in CUDA.items():
        setattr(torch.cuda, name, function)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.Tensor.pin_memory = _pinned
    _foreach_supported_types.append(PretendTensor)
    # A module that moves gets new parameters, as a tensor's kind cannot be changed in place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _copy_what_is_made_of_values()
    threading.Thread.run = _run_on_device
    PretendDevice().__enter__()
