"""Bases in which one example's gradient would depend on the presence of others."""

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.cli import UsageError

# Kinds of RoPE whose frequencies follow the longest row of a microbatch, or the longest ever seen,
# once a row is longer than what they were made for (transformers' `dynamic_rope_update`).
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Layers with quantised weights that compute each token apart.
INDEPENDENT_QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")


def silence_dropout(model: PreTrainedModel) -> None:
    """Set every dropout probability of a base to zero.

    Its masks are dealt by place in the microbatch, and training mode leaves it on: GPT-2's 0.1 lets
    one example move a clipped sum by 2.6 times the clip norm.
    """
    for holder in (*model.modules(), model.config):
        for name, value in vars(holder).items():
            is_probability = isinstance(value, float) and 0 < value <= 1
            if is_probability and ("drop" in name or isinstance(holder, nn.Dropout)):
                setattr(holder, name, 0.0)


def require_independent_examples(model: PreTrainedModel, max_seq_len: int) -> None:
    """Refuse a base in which examples of a microbatch, or of steps before, meet each other.

    Args:
        max_seq_len: tokens of the longest row there can be.

    Raises:
        UsageError: names what couples examples, and what to do.
    """
    _require_fixed_rope(model, max_seq_len)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(f"{name} is a {kind}, whose statistics are of all examples together")
        weight = getattr(module, "weight", None)
        quantised = isinstance(weight, torch.Tensor) and not weight.is_floating_point()
        if quantised and kind not in INDEPENDENT_QUANTISED_LAYERS:
            raise UsageError(
                f"{name} is a {kind}, a quantised layer that is not known to compute each example "
                "apart; use the base as it was before, with --load_in_4bit or --load_in_8bit"
            )
        threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
        if threshold:
            raise UsageError(
                f"the base is stored in 8 bits with an outlier threshold of {threshold:g}, under "
                "which one example changes how others are computed; use the base as it was "
                "before, with --load_in_8bit"
            )
    if getattr(model.config.get_text_config(), "expert_capacity", None):
        raise UsageError(
            f"{model.config.model_type} has experts of limited capacity, for which the examples "
            "of a microbatch compete; use another base"
        )


def _require_fixed_rope(model: PreTrainedModel, max_seq_len: int) -> None:
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    for each in sets:
        kind = each.get("rope_type", "default") if isinstance(each, dict) else "default"
        if not any(known in kind for known in LENGTH_DEPENDENT_ROPE):
            continue
        fixed_up_to = (
            each["original_max_position_embeddings"]
            if kind == "longrope"
            else config.max_position_embeddings
        )
        if max_seq_len > fixed_up_to:
            raise UsageError(
                f"--max_seq_len {max_seq_len}: beyond {fixed_up_to} tokens this base's RoPE (of "
                f"kind {kind}) follows the longest row that was drawn, so that rows are not "
                f"independent; use --max_seq_len {fixed_up_to} or less"
            )
