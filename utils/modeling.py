"""Models and tokenizers: load a base, attach LoRA, read an adapter back, merge it."""

import hashlib
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from utils.adapter_info import read_adapter_info
from utils.cli import UsageError, in_one_line, say
from utils.losses import example_losses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Architectures for which a right-padded batch without an attention mask is shown, by test, to
# give real tokens the same logits as with one: their attention is causal and nothing else.
MASK_FREE_MODEL_TYPES = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2",
}  # fmt: skip

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


def quiet_libraries() -> None:
    """Keep what libraries say about each other, and their progress bars, off the terminal."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype; `auto` is bfloat16 on GPUs that have it and float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def share_cores(num_processes: int) -> None:
    """Give this process its share of this machine's CPU cores.

    `accelerate launch` allows each process one thread where it is told of no number.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or folder.

    Raises:
        UsageError: not found, or without an end-of-sequence token.
    """
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model_name)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {model_name!r} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        # Padding is never attended to and carries no loss, so any existing id serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(model_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model of a hub id or folder, on the CPU.

    Raises:
        UsageError: not found, no access, or not a causal language model.
    """
    return _from_pretrained(AutoModelForCausalLM, "model", model_name, dtype=dtype)


def load_quantised_model(
    model_name: str, dtype: torch.dtype, bits: int, device: torch.device
) -> PreTrainedModel:
    """Load a base whose Linear layers bitsandbytes quantises on `device`: frozen, computing in
    `dtype`; embeddings and head stay as they are.

    Args:
        bits: 4 (NF4 with double quantisation, as in QLoRA; Dettmers et al., 2023) or 8 (LLM.int8;
            Dettmers et al., 2022).

    Raises:
        UsageError: bitsandbytes is not installed, or cannot do it here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--load_in_{bits}bit: pip install bitsandbytes")
    # It says on every call that it casts inputs to float16, as it always does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # With a threshold, a feature that is large in one example is computed otherwise in all
        # examples of the microbatch: one example's presence would change the others' gradients,
        # and the sum could move by more than the clip norm.
        llm_int8_threshold=0.0,
    )
    options = {"dtype": dtype, "quantization_config": config, "device_map": {"": device}}
    try:
        model = _from_pretrained(AutoModelForCausalLM, "model", model_name, **options)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        reason = in_one_line(error, 200)
        raise UsageError(
            f"--load_in_{bits}bit: bitsandbytes cannot quantise {model_name!r} on {device}: "
            f"{reason}"
        ) from None
    for module in model.modules():
        # On some CPUs the first pass in eval mode repacks the weights, for good, for a kernel that
        # has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _from_pretrained(loader, what: str, model_name: str, **options):
    folder = Path(model_name).expanduser()
    is_folder = folder.is_dir()
    if is_folder and not (folder / "config.json").is_file():
        raise UsageError(f"{model_name!r} is a folder without config.json, so it holds no model")
    if not is_folder and (folder.is_absolute() or model_name.count("/") > 1):
        raise UsageError(f"no model at {model_name!r}: there is no such folder")
    try:
        return loader.from_pretrained(
            str(folder) if is_folder else model_name, token=os.environ.get("HF_TOKEN"), **options
        )
    except (OSError, ValueError) as error:
        reason = in_one_line(error, 300)
        tried = f"the folder {model_name!r}" if is_folder else f"folder and hub id {model_name!r}"
        hint = (
            ""
            if is_folder
            else (
                "; a gated model needs HF_TOKEN in the environment, a local one its folder, and "
                "`python data/prepare_quickstart.py` makes data/quickstart_model"
            )
        )
        raise UsageError(f"cannot load a {what}: tried {tried}: {reason}{hint}") from None


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel, values_per_tensor: int = 64) -> str:
    """A short hash of a base model: names, shapes and the first values of every tensor.

    Values are cast to bfloat16, so that loading in another dtype leaves the hash alone.
    """
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        first = tensor.detach().flatten()[:values_per_tensor].to("cpu", torch.bfloat16)
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(first.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


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
) -> PeftModel:
    """Freeze `model` and add LoRA adapters in float32 without biases, the only trainable tensors.

    Args:
        target_modules: names of Linear layers, or "all-linear".
        use_rslora: scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski, 2023).
        rank_pattern: ranks of layers that differ, by name; alpha_pattern: likewise.

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
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        reason = in_one_line(error, 200)
        raise UsageError(f"--target_modules {target_modules}: {reason}") from None
    adapted = [n for n, module in peft_model.named_modules() if isinstance(module, LoraLayer)]
    for flag, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern)):
        for target in pattern or {}:
            if not any(_names(target, name) for name in adapted):
                raise UsageError(
                    f"--{flag}_pattern {target}: no adapted layer has that name; they are "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in adapted}))}"
                )
    if gradient_checkpointing:
        # Non-reentrant (the default): it recomputes under autograd, so hooks run again.
        model.activation_checkpointing_enable()
    return peft_model


class LanguageModel:
    """A causal LM cut into decoder and frozen head, for per-example losses of padded batches.

    The head carries the scalings that configurations name: a factor (Cohere), a divisor
    (Granite), a soft-cap (Gemma). A model whose own logits the two parts do not reproduce keeps
    its own head, with a line on stderr that says so.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.needs_mask = model.config.model_type not in MASK_FREE_MODEL_TYPES
        self._own_head = False
        if not self._parts_are_exact():
            say(f"{model.config.model_type}: its own head is used, so all logits are held at once")
            self._own_head = True

    def example_losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed token losses (float32) and numbers of tokens with loss, both [examples].

        Args:
            batch: `input_ids` [examples, tokens], right-padded; `lengths` and `loss_starts`
                [examples].
        """
        mask = None
        if self.needs_mask:
            positions = torch.arange(batch["input_ids"].shape[1], device=batch["lengths"].device)
            mask = (positions < batch["lengths"][:, None]).long()
        hidden = self._decode(batch["input_ids"], mask)
        return example_losses(
            hidden, batch["input_ids"], batch["loss_starts"], batch["lengths"],
            self._head, self.vocabulary,
        )  # fmt: skip

    def public_batch(self, examples: int, tokens: int = 4) -> dict[str, torch.Tensor]:
        """A batch of arbitrary tokens that no data went into, for passes that only check."""
        ids = torch.arange(examples * tokens, device=self.model.device) * 7919 % self.vocabulary
        lengths = torch.full((examples,), tokens, device=ids.device)
        return {
            "input_ids": ids.view(examples, tokens),
            "lengths": lengths,
            "loss_starts": torch.zeros_like(lengths),
        }

    def idle_pass(self) -> None:
        """A forward and a backward pass that add nothing.

        With a sharded base, a rank that has no microbatch left keeps pace with the others, whose
        layers it holds a part of.
        """
        losses, _ = self.example_losses(self.public_batch(1))
        (0 * losses.sum()).backward()

    def _decode(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        part = self.model if self._own_head else self.model.base_model
        return part(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._own_head:
            return hidden
        config = self.model.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        logits = self.model.get_output_embeddings()(hidden)
        if factor != divisor:
            logits = logits * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def _parts_are_exact(self, tokens: int = 16) -> bool:
        """Compare with the model's own logits on arbitrary (public) tokens."""
        ids = self.public_batch(1, tokens)["input_ids"]
        training = self.model.training
        self.model.eval()
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        parts = self._head(self._decode(ids, None)).float()
        self.model.train(training)
        return torch.allclose(own, parts, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def load_adapted(
    model_name: str, adapter_path: str | os.PathLike, dtype: torch.dtype, *, merge: bool
) -> PreTrainedModel:
    """Load a base model with a LoRA adapter.

    Args:
        merge: add the adapter to the base's weights (in float32, then cast); else keep it apart,
            in float32 beside a base of `dtype`.

    Raises:
        UsageError: no adapter there, or one that was trained on another base.
    """
    info = read_adapter_info(adapter_path)
    model = load_base_model(model_name, torch.float32 if merge else dtype)
    trained_on = info.get("base_model_fingerprint")
    if trained_on not in (None, model_fingerprint(model)):
        raise UsageError(
            f"the adapter {str(adapter_path)!r} was trained on {info.get('base_model')!r}, "
            f"which differs from --model_name {model_name!r}"
        )
    try:
        model = PeftModel.from_pretrained(model, str(adapter_path))
    except (RuntimeError, ValueError) as error:
        reason = in_one_line(error, 200)
        raise UsageError(
            f"the adapter {str(adapter_path)!r} does not fit --model_name {model_name!r}: {reason}"
        ) from None
    return model.merge_and_unload().to(dtype) if merge else model.get_base_model()
