"""Small real parts, made on the fly."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from privacy_checks.tiny_model import tiny_llama
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.models.lora import attach_lora
from utils.models.losses import normalise
from utils.runs.batching import cut_microbatches
from utils.texts.tokens import TokenisedExamples


def slow(*values):
    """Parameters for `pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def python_with(folder, package):
    """Python of an environment of its own, made in `folder`, with a package as pip names it."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def tiny_model(model_type, *, seed=0, **settings) -> PreTrainedModel:
    """A random model of any architecture: 2 layers, hidden 32, 4 heads, 259 tokens, no dropout."""
    sizes = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(sizes | settings))
    for name in vars(config):
        if name.endswith(("pdrop", "dropout")):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted_model(targets, *, checkpointing=False, rank=4, seed=0, base=None, dropout=0.0, **lora):
    """`base` (`tiny_llama`) with LoRA whose A and B are both random: no gradient is zero."""
    base = base or tiny_llama(seed)
    torch.manual_seed(seed)
    model = attach_lora(base, rank, 2 * rank, dropout, targets, checkpointing, **lora)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    return model.train()


def random_examples(lengths, loss_starts=None, seed=0) -> TokenisedExamples:
    """Examples of the given lengths, with random tokens below 258."""
    random = np.random.default_rng(seed)
    return TokenisedExamples(
        ids=random.integers(3, 258, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        loss_starts=np.array(loss_starts or [0] * len(lengths), dtype=np.int32),
    )


def clipped_sum(
    model, data, clip_norm, *, indices=None, budget=10_000, clip_function="flat",
    normalization="max_seq_len", max_seq_len=64,
):  # fmt: skip
    """The clipped sum [parameters] as `train.py` makes it, and the norms in order of `indices`."""
    # Hooks of an earlier call must not see this one's passes.
    for module in model.modules():
        module._forward_hooks.clear()
    gradients = PerExampleGradients(model)
    language_model = LanguageModel(model.get_base_model())
    device = next(model.parameters()).device
    total = torch.zeros(gradients.num_parameters, device=device)
    indices = np.arange(len(data)) if indices is None else indices
    norms = torch.zeros(len(data))
    for part in cut_microbatches(indices, data.lengths, budget)[0]:
        microbatch = part.examples
        with gradients.capture(len(microbatch)):
            batch = data.collate(microbatch, pad_id=0, device=device)
            sums, counts = language_model.example_losses(batch)
            normalise(sums, counts, normalization, max_seq_len).sum().backward()
        norms[microbatch] = gradients.add_clipped_sum(total, clip_norm, clip_function).cpu()
    return total, norms[indices]


def reference_gradients(model, data, *, normalization="max_seq_len", max_seq_len=64):
    """Per-example gradients [examples, parameters] in float64, one example at a time, by autograd.

    Uses the model's own logits and loss arithmetic of its own, and none of the code under test.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        module._forward_hooks.clear()
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    rows = []
    for index in range(len(data)):
        ids = torch.tensor(data.ids[data.offsets[index] : data.offsets[index + 1]]).long()
        first = max(1, int(data.loss_starts[index]))
        if first >= len(ids):
            rows.append(torch.zeros(sum(t.numel() for t in trainable), dtype=torch.float64))
            continue
        logits = model(input_ids=ids[None]).logits[0]
        log_probabilities = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        loss = -log_probabilities[first - 1 :].sum()
        loss = loss / (max_seq_len if normalization == "max_seq_len" else len(ids) - first)
        gradients = torch.autograd.grad(loss, trainable)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def reference_sum(model, data, clip_norm, clip_function="flat", **options):
    """The clipped sum in float64, from one backward pass per example."""
    gradients = reference_gradients(model, data, **options)
    norms = gradients.norm(dim=1, keepdim=True)
    if clip_function == "automatic":
        return (gradients * clip_norm / (norms + 0.01)).sum(0), norms
    return (gradients * (clip_norm / norms).clamp(max=1)).sum(0), norms


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()
