"""Bases in which one example's gradient would depend on the presence of others."""

from collections.abc import Callable

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
    require_known_quantisation(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(f"{name} is a {kind}, whose statistics are of all examples together")
        weight = getattr(module, "weight", None)
        quantised = isinstance(weight, torch.Tensor) and weight.element_size() == 1
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


def require_known_quantisation(model: PreTrainedModel) -> None:
    """Refuse a base that is stored quantised in a way that adapters cannot be trained on.

    Raises:
        UsageError: names the method.
    """
    stored = getattr(model.config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    if method and str(getattr(method, "value", method)) != "bitsandbytes":
        raise UsageError(
            f"the base is stored quantised by {getattr(method, 'value', method)}, which is not "
            "known to compute each example apart; use the base as it was before, with "
            "--load_in_4bit or --load_in_8bit"
        )


def require_no_other_randomness(model: nn.Module, one_pass: Callable[[], object]) -> None:
    """Refuse a base that draws random numbers of its own in training.

    They would be dealt by place in the microbatch, as a router's jitter is, and follow a public
    seed.

    Args:
        one_pass: a forward pass of public examples.

    Raises:
        UsageError: the pass moved one of torch's generators.
    """

    def states() -> list[torch.Tensor]:
        on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *on_gpu]

    training, before = model.training, states()
    model.train()
    with torch.no_grad():
        one_pass()
    model.train(training)
    if not all(torch.equal(old, new) for old, new in zip(before, states())):
        raise UsageError(
            "this base draws random numbers of its own in training (a router's jitter, or dropout "
            "of a kind that cannot be switched off), by which one example changes how others are "
            "computed; use another base, or switch that off in its config.json"
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
