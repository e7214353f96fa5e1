"""Models and tokenizers: load a base, attach LoRA, read an adapter back, merge it."""

import hashlib
import importlib.util
import os
import warnings

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from utils.cli import UsageError, in_one_line
from utils.models.base_folder import model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quiet_libraries() -> None:
    """Keep what libraries say about each other, and their progress bars, off the terminal."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype; `auto` is bfloat16 on GPUs that have it and float32 elsewhere.

    Raises:
        UsageError: bfloat16 on a GPU that only emulates it.
    """
    # What is emulated is said to be supported, unless one asks for what the GPU has.
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if name == "bfloat16" and not has_bfloat16:
        major, minor = torch.cuda.get_device_capability(device)
        raise UsageError(
            f"--dtype bfloat16: this GPU's compute capability is {major}.{minor}, below 8.0: it "
            "would emulate bfloat16, slowly and with other rounding; use --dtype float32"
        )
    return DTYPES[name]


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
    try:
        tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model_name)
    except UsageError:
        raise
    except Exception as error:  # of no closer kind, where the library's part in Rust raises it
        reason = f"{type(error).__name__}: {in_one_line(error, 200)}"
        raise UsageError(f"the tokenizer of {model_name!r} is damaged: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {model_name!r} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        # Padding is never attended to and carries no loss, so any existing id serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(model_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model of a hub id or folder, on the CPU.

    Raises:
        UsageError: not found, no access, not a causal language model, or one of whose weights some
            are missing.
    """
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = _from_pretrained(AutoModelForCausalLM, "model", model_name, **options)
    except (ImportError, RuntimeError) as error:
        reason = in_one_line(error, 300)
        raise UsageError(f"cannot load the model {model_name!r}: {reason}") from None
    # What does not fit would be random numbers, as would the head of a config that says it is not
    # tied.
    for name, saved, expected in sorted(found["mismatched_keys"]):
        raise UsageError(
            f"the model {model_name!r} has weights {list(saved)} for {name}, which its config.json "
            f"says to be {list(expected)}; restore its files"
        )
    for name in sorted(found["missing_keys"]):
        raise UsageError(
            f"the model {model_name!r} has no weights for {name}, which its config.json asks for; "
            "restore its files (if its head is its embedding, config.json says so with "
            '"tie_word_embeddings": true)'
        )
    return model


def load_skeleton(model_name: str) -> PreTrainedModel:
    """The causal language model of a hub id or folder without its weights, on the meta device.

    Its own quantisation, if it has one, is in its config alone.

    Raises:
        UsageError: see `load_base_model`.
    """
    config = _from_pretrained(AutoConfig, "config", model_name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = in_one_line(error, 300)
        raise UsageError(f"the config.json of {model_name!r} makes no model: {reason}") from None


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
    folder = model_folder(model_name)
    try:
        # Code that comes with a model is never run, nor is it asked for on the terminal.
        return loader.from_pretrained(
            model_name if folder is None else str(folder),
            token=os.environ.get("HF_TOKEN"),
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = in_one_line(error, 300)
        tried = f"the folder {model_name!r}" if folder else f"folder and hub id {model_name!r}"
        hint = (
            ""
            if folder
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
