"""LoRA adapters: attach them to a base, read them back, merge them."""

import os
import warnings
from pickle import UnpicklingError

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import load_peft_weights
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.cli import UsageError, in_one_line
from utils.dp_utils import FactorLinear
from utils.models.adapter_info import read_adapter_info
from utils.models.loading import load_base_model, model_fingerprint
from utils.row_dropout import RowDropout, RowMasks

# The attention projections under the names that architectures give them. A model's default targets
# are the first group of which it has every name.
ATTENTION_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # LLaMA, Mistral, Qwen, Gemma, OLMo, Cohere, ...
    ("qkv_proj", "o_proj"),  # Phi-3
    ("query_key_value", "attention.dense"),  # GPT-NeoX
    ("query_key_value", "self_attention.dense"),  # Falcon, BLOOM
    ("c_attn", "attn.c_proj"),  # GPT-2, GPT-BigCode
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-J
    ("q_proj", "k_proj", "v_proj", "self_attn.dense"),  # Phi
    ("Wqkv", "out_proj"),  # MPT
)

# What PEFT raises for a configuration that makes no sense, or not with these weights.
_UNFIT = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError)


def default_target_modules(model: PreTrainedModel) -> list[str]:
    """The attention projections of an architecture, all of them, under the names it gives them.

    Raises:
        UsageError: none of the known names; the message lists the candidates.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    for group in ATTENTION_PROJECTIONS:
        if all(any(_names(target, name) for name in linear) for target in group):
            return list(group)
    head = model.get_output_embeddings()
    candidates = {name.rpartition(".")[2] for name in linear if modules[name] is not head}
    model_type = model.config.model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    raise UsageError(
        f"no default --target_modules for {model_type}; its Linear layers are "
        f"{', '.join(sorted(candidates))}{f', of which PEFT adapts {known}' if known else ''}; "
        "name some, or use all-linear"
    )


def _names(target: str, module_name: str) -> bool:
    """Whether PEFT takes `module_name` for the target module `target`."""
    return module_name == target or module_name.endswith(f".{target}")


class BaseDtypeLora(Linear):
    """PEFT's layer, computing in the dtype of the base: no copies of inputs in float32.

    Its float32 weights are cast where they multiply, and B's product is added to the base's output
    by the product itself.
    """

    def update_layer(self, adapter_name: str, *given, **settings) -> None:
        super().update_layer(adapter_name, *given, **settings)
        for factors in (self.lora_A, self.lora_B):
            weight = factors[adapter_name].weight
            factor = FactorLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            factor.weight = weight
            factors[adapter_name] = factor

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            # Scaled where it has few features.
            low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            result = self.lora_B[name](low, result)
        return result


def attach_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | str,
    gradient_checkpointing: bool,
    *,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    frozen_a: bool = False,
) -> PeftModel:
    """Freeze `model` and add LoRA adapters in float32 without biases, the only trainable tensors.

    Args:
        target_modules: names of Linear layers, or "all-linear".
        use_rslora: scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski, 2023).
        rank_pattern: ranks of layers that differ, by name; alpha_pattern: likewise.
        frozen_a: A stays as it is drawn from torch's generator (Sun et al., 2024, "FFA-LoRA"):
            noise is then added to half as many numbers, and B A to it in first order alone.

    Raises:
        UsageError: the model has none of the target modules, or a pattern names no adapted layer.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )
    model.config.use_cache = False
    if model.dtype == torch.bfloat16:
        config._register_custom_module({nn.Linear: BaseDtypeLora})
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        reason = in_one_line(error, 200)
        raise UsageError(f"--target_modules {target_modules}: {reason}") from None
    if adapts_tied_head(peft_model):
        raise UsageError(
            f"--target_modules {target_modules}: the head of this model is its embedding "
            "(tie_word_embeddings), and an adapter on one of them would change both when it is "
            "merged; leave it out"
        )
    adapted = [n for n, module in peft_model.named_modules() if isinstance(module, LoraLayer)]
    for flag, pattern in (("rank", rank_pattern or {}), ("alpha", alpha_pattern or {})):
        for target in pattern:
            if not any(_names(target, name) for name in adapted):
                raise UsageError(
                    f"--{flag}_pattern {target}: no adapted layer has that name; they are "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in adapted}))}"
                )
    if frozen_a:
        for name, tensor in peft_model.named_parameters():
            if ".lora_A." in name:
                tensor.requires_grad_(False)
    if gradient_checkpointing:
        # Non-reentrant (the default): it recomputes under autograd, so hooks run again.
        model.activation_checkpointing_enable()
    return peft_model


def frozen_factors(model: PeftModel) -> dict[str, nn.Parameter]:
    """The tensors of the adapters that are not trained, by name."""
    return {
        name: tensor
        for name, tensor in model.named_parameters()
        if ".lora_" in name and not tensor.requires_grad
    }


def use_row_dropout(model: PeftModel, masks: RowMasks) -> None:
    """Replace the dropout of every adapted layer by one whose masks follow the row."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(adapted):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):  # where there is none, PEFT has an identity
                layer.lora_dropout[name] = RowDropout(dropout.p, masks, number)


def load_adapted(
    model_name: str,
    adapter_path: str | os.PathLike,
    dtype: torch.dtype,
    *,
    merge: bool,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a base model of `dtype` with a LoRA adapter, onto `device`.

    Args:
        merge: add the adapter to the base's weights, there, one matrix after the other: each sum is
            made in float32 and then cast; else keep it apart, in float32.

    Raises:
        UsageError: no adapter there, one that was trained on another base, or one that is not, name
            by name and shape by shape, what its configuration makes of this base.
    """
    info = read_adapter_info(adapter_path)
    base = load_base_model(model_name, dtype)
    trained_on = info.get("base_model_fingerprint")
    if trained_on not in (None, model_fingerprint(base)):
        raise UsageError(
            f"the adapter {str(adapter_path)!r} was trained on {info.get('base_model')!r}, "
            f"which differs from --model_name {model_name!r}"
        )
    model = attach_saved(base, model_name, str(adapter_path), merge=merge)
    model.to(device)
    return model.merge_and_unload() if merge else model.get_base_model()


def attach_saved(
    base: PreTrainedModel, model_name: str, adapter_path: str, *, merge: bool
) -> PeftModel:
    """A base with the weights of a LoRA adapter, each of which must fit.

    Args:
        base: may be on the meta device, to see whether the adapter fits.
        merge: whether the adapter is going to be merged into the base.

    Raises:
        UsageError: see `load_adapted`; or it is to be merged into a head that is the embedding too.
    """
    try:
        weights = load_peft_weights(adapter_path, device="cpu")
        # On the meta device, so that a rank costs no memory before it is known to be the weights'.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            model = PeftModel.from_pretrained(base, adapter_path, low_cpu_mem_usage=True)
    except (*_UNFIT, SafetensorError, UnpicklingError) as error:
        reason = in_one_line(error, 200)
        raise UsageError(
            f"the adapter {adapter_path!r} does not fit --model_name {model_name!r}: {reason}"
        ) from None
    _require_all(model, weights, adapter_path)
    if merge and adapts_tied_head(model):
        raise UsageError(
            f"the adapter {adapter_path!r} is of the head of {model_name!r}, which is its "
            "embedding too: merged into one it would change both; add --no_merge"
        )
    if base.device.type != "meta":
        # PEFT has rounded them to the base's dtype on their way to float32.
        set_peft_model_state_dict(model, weights)
    return model


def adapts_tied_head(model: PeftModel) -> bool:
    """Whether an adapter is on a head, or an embedding, that are one tensor."""
    base = model.get_base_model()
    if not base.config.get_text_config().tie_word_embeddings:
        return False
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return any(isinstance(end, LoraLayer) for end in ends)


def _require_all(model: PeftModel, weights: dict[str, torch.Tensor], adapter_path: str) -> None:
    """Refuse an adapter whose weights are not all of what was attached, or are more than that.

    PEFT leaves a tensor that is missing or has another name as it began, and samples would be the
    base's.

    Raises:
        UsageError: names a tensor.
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UsageError(
                f"the adapter {adapter_path!r} lacks {name}, which its configuration asks for; "
                "restore its own weights"
            )
        if name not in expected and name not in own:
            raise UsageError(
                f"the adapter {adapter_path!r} has {name}, which no layer of this model takes; use "
                "the model that it was trained on"
            )
