"""Bytes that one DP microbatch moves to and from a GPU's memory: counted from shapes, not run.

    python -m benchmarks.traffic --model 13b

A LLaMA of the real shapes in bfloat16 and the code that trains it, on tensors without values; one
and two layers tell what all of them move. Of every operation of the forward and backward pass, of
the norms and of the clipped sum counts what a kernel of its own that reads each input once and
writes each output once moves: views and memory that is only set aside count nothing, what is
gathered counts as much as it gives, and nothing is fused but attention (FlashAttention). Caches and
what kernels read twice are left out. Three columns: the base without adapters, PEFT's own layers,
which compute in float32, and those that `train.py` trains.
"""

from dataclasses import dataclass, replace

from benchmarks import figures
from utils.command_line.parser import answer_early, flag, read_flags
from utils.models.footprint import ATTENTION, LLAMA, Architecture


@dataclass(frozen=True, kw_only=True)
class Settings(figures.Settings):
    """The flags of the count."""

    model: list[str] = flag("sizes of LLaMA 2", ["13b"], nargs="+", choices=tuple(LLAMA))
    perdevice_bs: int = flag("rows of the microbatch", 4)
    max_seq_len: int = flag("tokens of each row", 1024)
    lora_r: int = flag("rank", 8)
    lora_dropout: float = flag("probability, by row", 0.0)
    target_modules: list[str] = flag("or all-linear", list(ATTENTION), nargs="+")
    gradient_checkpointing: bool = flag("recompute layers in the backward pass", False)


answer_early(__name__, Settings, __doc__)

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from utils.cli import EXIT_OK, run_cli
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.models.lora import attach_lora, use_row_dropout
from utils.models.losses import normalise
from utils.row_dropout import RowMasks

GB = 1e9
HEAD = 128
COLUMNS = ("base alone", "PEFT's layers", "ours")
# Kinds of operations, by name; all others go by "elementwise".
KINDS = {
    "matrix products": {"mm", "bmm", "addmm", "baddbmm", "addmv", "addmv_"},
    "attention": {
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
    },
    "casts": {"_to_copy"},
    "reductions": {"sum", "mean", "amax", "all", "linalg_vector_norm"},
    "copies": {
        "cat", "clone", "copy_", "stack", "index", "gather", "embedding", "index_put_",
        "_index_put_impl_", "new_zeros", "zeros", "zeros_like", "fill_", "zero_",
    },
}  # fmt: skip
# Those that start no kernel without being views by their schema.
FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
        "_local_scalar_dense", "lift_fresh", "is_same_size"}  # fmt: skip
# Those that give as much of their first tensor as they read of it, and those that write into it.
GATHERS = {"index", "gather", "embedding", "nonzero_static"}
SCATTERS = {"index_put_", "_index_put_impl_", "index_put"}
# Those that do not read the tensor that they fill, or whose shape they take.
FILLS = {"copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros",
         "new_full", "new_ones"}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    settings = read_flags(Settings, __doc__, argv)
    found = [
        {"model": model}
        | {column: dict(count(settings, LLAMA[model], column)) for column in COLUMNS}
        for model in settings.model
    ]
    for row in found:
        print(table(row))
    settings.write(found)
    return EXIT_OK


def count(settings: Settings, shape: Architecture, column: str) -> dict[str, int]:
    """Bytes of a microbatch, by kind of operation.

    Args:
        column: one of `COLUMNS`.
    """
    one, two = (count_all(settings, replace(shape, layers=layers), column) for layers in (1, 2))
    return {kind: one[kind] + (shape.layers - 1) * (two[kind] - one[kind]) for kind in two}


def count_all(settings: Settings, shape: Architecture, column: str) -> Counter[str]:
    """The same, of every layer by itself."""
    traffic = Traffic([settings.max_seq_len - 1] * settings.perdevice_bs)
    with torch.device("meta"), counted(traffic):
        base = empty_llama(shape, settings.max_seq_len)
        one_pass = {"base alone": frozen, "PEFT's layers": by_peft, "ours": ours}[column](
            settings, base
        )
        traffic.by_kind.clear()
        one_pass()
    return traffic.by_kind


def table(row: dict) -> str:
    """GB by kind of operation, in Markdown."""
    kinds = [*KINDS, "elementwise"]
    cells = [
        [kind, *(f"{row[column].get(kind, 0) / GB:.0f}" for column in COLUMNS)] for kind in kinds
    ]
    cells.append(["all", *(f"{sum(row[column].values()) / GB:.0f}" for column in COLUMNS)])
    return figures.markdown([f"{row['model']}, GB", *COLUMNS], cells)


# ------------------------------------------------------------------------ what is counted


def empty_llama(shape: Architecture, tokens: int) -> PreTrainedModel:
    """A LLaMA in bfloat16 of this architecture, without values."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.query // min(HEAD, shape.hidden),
        num_key_value_heads=shape.key_value // min(HEAD, shape.hidden),
        vocab_size=shape.vocabulary,
        max_position_embeddings=tokens,
        dtype="bfloat16",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def frozen(settings: Settings, base: PreTrainedModel) -> Callable[[], object]:
    """A pass of the base alone, back to its embeddings."""
    base.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable()
    language_model = LanguageModel(base.train())
    return lambda: losses_of(settings, language_model).backward()


def by_peft(settings: Settings, base: PreTrainedModel) -> Callable[[], object]:
    """A pass of DP training through PEFT's layers as they are."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=_targets(settings),
    )
    model = get_peft_model(base, config)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable()
    return private_pass(settings, base, model)


def ours(settings: Settings, base: PreTrainedModel) -> Callable[[], object]:
    """A pass of DP training as `train.py` makes it."""
    model = attach_lora(
        base, settings.lora_r, 2 * settings.lora_r, settings.lora_dropout, _targets(settings),
        settings.gradient_checkpointing,
    )  # fmt: skip
    return private_pass(settings, base, model)


def private_pass(
    settings: Settings, base: PreTrainedModel, model: torch.nn.Module
) -> Callable[[], object]:
    """Forward and backward pass, norms and clipped sum."""
    masks = RowMasks(b"public")
    masks.rows = np.arange(settings.perdevice_bs)
    use_row_dropout(model.train(), masks)
    gradients = PerExampleGradients(model)
    language_model, total = LanguageModel(base), torch.zeros(gradients.num_parameters)

    def one_pass() -> None:
        with gradients.capture(settings.perdevice_bs):
            losses_of(settings, language_model).backward()
        gradients.add_clipped_sum(total, 1.0, "flat")

    return one_pass


def losses_of(settings: Settings, language_model: LanguageModel) -> torch.Tensor:
    """The summed losses of the microbatch."""
    batch = language_model.public_batch(settings.perdevice_bs, settings.max_seq_len)
    sums, counts = language_model.example_losses(batch)
    return normalise(sums, counts, "tokens", settings.max_seq_len).sum()


def _targets(settings: Settings) -> list[str] | str:
    targets = settings.target_modules
    return "all-linear" if targets == ["all-linear"] else targets


# ------------------------------------------------------------------------ how it is counted


class Traffic(TorchDispatchMode):
    """Counts bytes by kind of operation, on tensors without values.

    Args:
        answers: what `tolist` gives, for the numbers of tokens with loss; of all other values that
            are asked for, the answer is yes, as of norms that are all finite.
    """

    def __init__(self, answers: list[int]):
        super().__init__()
        self.answers = answers
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in ("_local_scalar_dense", "allclose"):
            return True
        result = func(*args, **(kwargs or {}))
        if name not in FREE and not _is_view(func):
            given, made = (
                [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
                for values in ((args, kwargs), result)
            )
            kind = next((kind for kind, names in KINDS.items() if name in names), "elementwise")
            self.by_kind[kind] += moved(name, given, made)
        return result


class _Answers(TorchFunctionMode):
    """Lets code go on that asks for values which there are not."""

    def __init__(self, answers: list[int]):
        self._answers = answers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].is_meta:
            return self._answers
        if func is torch.Tensor.cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu")
        return func(*args, **(kwargs or {}))


def _flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    assert attn_mask is None
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def counted(traffic: Traffic) -> Iterator[None]:
    """Count what is computed in the block, attention by the kernel of a GPU."""
    attention = patch.object(torch.nn.functional, "scaled_dot_product_attention", _flash)
    with _Answers(traffic.answers), traffic, attention:
        yield


def moved(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes.

    Args:
        given, made: its tensors, in the order of its arguments and of its results.
    """
    if name in GATHERS:
        return 2 * sum(map(_bytes, made)) + sum(map(_bytes, given[1:]))
    if name in SCATTERS:
        return 2 * _bytes(given[-1]) + sum(map(_bytes, given[1:-1]))
    return sum(map(_bytes, given[name in FILLS :])) + sum(map(_bytes, made))


def _bytes(tensor: torch.Tensor) -> int:
    """Of the elements that a tensor has; those that it repeats count once."""
    sizes = (size for size, step in zip(tensor.shape, tensor.stride()) if step)
    return tensor.itemsize * int(np.prod([*sizes, min(1, tensor.numel())], dtype=np.int64))


def _is_view(func) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


if __name__ == "__main__":
    run_cli(main)
