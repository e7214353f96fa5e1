"""Models and tokenizers: load a base, attach LoRA, read an adapter back, merge it."""

import hashlib
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils.adapter_info import read_adapter_info
from utils.cli import UsageError, say
from utils.losses import example_losses

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Architectures for which a right-padded batch without an attention mask is shown, by test, to
# give real tokens the same logits as with one: their attention is causal and nothing else.
MASK_FREE_MODEL_TYPES = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2",
}  # fmt: skip


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype; `auto` is bfloat16 on GPUs that have it and float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def share_cores(num_processes: int) -> None:
    """Give this process its share of the CPU cores.

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
        reason = " ".join(str(error).split())[:300]
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


def attach_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | str,
    gradient_checkpointing: bool,
) -> PeftModel:
    """Freeze `model` and add LoRA adapters in float32, the only trainable tensors.

    Args:
        target_modules: names of Linear layers, or "all-linear".

    Raises:
        UsageError: the model has none of the target modules.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
    )
    model.config.use_cache = False
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--target_modules {target_modules}: {reason}") from None
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
        ids = torch.arange(tokens, device=self.model.device).unsqueeze(0) * 7919 % self.vocabulary
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
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the adapter {str(adapter_path)!r} does not fit --model_name {model_name!r}: {reason}"
        ) from None
    return model.merge_and_unload().to(dtype) if merge else model.get_base_model()
