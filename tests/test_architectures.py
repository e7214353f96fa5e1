"""Architectures and LoRA variants: the fast path's clipped sum against the float64 reference."""

import re

import peft
import pytest
import torch

import train
from tests.helpers import (
    adapted_model,
    clipped_sum,
    random_examples,
    reference_sum,
    relative_error,
    tiny_model,
)
from utils.cli import UsageError
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import MASK_FREE_MODEL_TYPES, LanguageModel
from utils.models.lora import default_target_modules

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Type, settings that differ, default target modules. Windows of 8 tokens, which texts pass.
ARCHITECTURES = {
    "LLaMA, multi-head": ("llama", {}, QKVO),
    "LLaMA, grouped queries": ("llama", {"num_key_value_heads": 2}, QKVO),
    "Mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}, QKVO),
    "Mistral, sliding window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}, QKVO),
    "Qwen2": ("qwen2", {"num_key_value_heads": 2}, QKVO),
    "Qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}, QKVO),
    "Gemma 2": ("gemma2", {"head_dim": 8, "sliding_window": 8}, QKVO),
    # One layer of each kind of attention.
    "Gemma 3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        QKVO,
    ),
    "Phi-3": ("phi3", {}, ["qkv_proj", "o_proj"]),
    "GPT-2": ("gpt2", {}, ["c_attn", "attn.c_proj"]),
    "GPT-NeoX": ("gpt_neox", {}, ["query_key_value", "attention.dense"]),
    "OLMo 2": ("olmo2", {}, QKVO),
}  # fmt: skip
TYPES = {model_type for model_type, _, _ in ARCHITECTURES.values()}
matrix = pytest.mark.parametrize(
    ("model_type", "settings", "targets"), ARCHITECTURES.values(), ids=ARCHITECTURES
)


def assert_equals_reference(model, data):
    """The clipped sum, with half of the examples clipped, in microbatches and in one batch."""
    _, norms = reference_sum(model, data, 1.0)
    clip_norm = norms.median().item()
    expected, _ = reference_sum(model, data, clip_norm)
    for budget in (40, 10_000):
        total, observed = clipped_sum(model, data, clip_norm, budget=budget)
        assert relative_error(total, expected) < 1e-5
        assert torch.allclose(observed.double(), norms.flatten(), rtol=1e-5)


@matrix
def test_default_targets_are_the_attention_projections(model_type, settings, targets):
    assert default_target_modules(tiny_model(model_type, **settings)) == targets


@matrix
@pytest.mark.parametrize("all_linear", [False, True], ids=["default targets", "all-linear"])
def test_clipped_sum_equals_one_by_one_reference(model_type, settings, targets, all_linear):
    model = adapted_model(
        "all-linear" if all_linear else targets, base=tiny_model(model_type, **settings)
    )
    assert_equals_reference(model, random_examples([19, 40, 3, 1, 26]))


@matrix
def test_batches_without_a_mask_equal_masked_ones(model_type, settings, targets):
    language_model = LanguageModel(tiny_model(model_type, **settings))
    data = random_examples([19, 40, 3]).collate([0, 1, 2], pad_id=0)
    assert not language_model.needs_mask
    unmasked, _ = language_model.example_losses(data)
    language_model.needs_mask = True
    masked, _ = language_model.example_losses(data)
    assert torch.allclose(unmasked, masked, rtol=1e-6)
    language_model.needs_mask = False
    shorter, _ = language_model.example_losses(random_examples([19, 40, 3]).collate([0], pad_id=7))
    assert torch.allclose(unmasked[:1], shorter, rtol=1e-6)  # nor does padding matter


def test_every_architecture_that_goes_without_a_mask_is_in_the_matrix():
    assert TYPES == MASK_FREE_MODEL_TYPES


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.k_proj": 2}},
        {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 5.0}, "use_rslora": True},
    ],
    ids=["rsLoRA", "ranks", "ranks and alphas"],
)
def test_lora_variants_equal_the_reference_and_are_what_was_asked(lora):
    model = adapted_model(QKVO, **lora)
    assert_equals_reference(model, random_examples([19, 40, 3, 1, 26]))
    config = model.peft_config["default"]
    assert config.bias == "none"
    for number, block in enumerate(model.get_base_model().model.layers):
        for name in QKVO:
            layer = getattr(block.self_attn, name)
            pattern = lora.get("rank_pattern", {})
            rank = pattern.get(f"layers.{number}.self_attn.{name}", pattern.get(name, 4))
            alpha = lora.get("alpha_pattern", {}).get(name, 8)
            assert layer.lora_A["default"].out_features == rank
            root = rank**0.5 if config.use_rslora else rank
            assert layer.scaling["default"] == pytest.approx(alpha / root)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_adapted_layer_is_refused(pattern):
    with pytest.raises(UsageError, match=f"--{pattern} up_proj.*k_proj, o_proj, q_proj, v_proj"):
        adapted_model(QKVO, **{pattern: {"up_proj": 2}})


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deepseek_v3", "deepseek_v3; its Linear layers are .*kv_b_proj.*all-linear"),
        ("rwkv", "of which PEFT adapts"),
    ],
)
def test_an_unknown_architecture_is_told_its_candidates(model_type, message):
    with pytest.raises(UsageError, match=message) as refused:
        default_target_modules(tiny_model(model_type, attention_hidden_size=32))
    assert "lm_head" not in str(refused.value)


def refusal(model) -> str:
    """What training says to a model, by the checks that it makes before the first step."""
    with pytest.raises(UsageError) as refused:
        train.require_coverage(PerExampleGradients(model), LanguageModel(model.get_base_model()))
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector"),
        ({"bias": "lora_only"}, r"bias"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save"),
        ({"trainable_token_indices": [5]}, r"trainable_tokens"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, r"q_proj"),
    ],
    ids=str,
)  # fmt: skip
def test_what_clipping_does_not_cover_is_refused_by_name(settings, named):
    config = peft.LoraConfig(r=2, **({"target_modules": QKVO} | settings))
    model = tiny_model("llama", attention_bias="bias" in settings)
    message = refusal(peft.get_peft_model(model, config))
    assert re.search(named, message), message


@pytest.mark.parametrize("tied", ["adapters", "layers"])
def test_tied_adapters_are_refused_by_name(tied):
    model = adapted_model(["q_proj"])
    first, second = model.get_base_model().model.layers
    if tied == "adapters":
        second.self_attn.q_proj.lora_A = first.self_attn.q_proj.lora_A
    else:
        second.self_attn = first.self_attn
    assert re.search(r"lora_[AB]", refusal(model))


def test_an_adapter_that_sees_flattened_tokens_is_refused_by_name():
    experts = tiny_model(
        "qwen2_moe", moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    )
    message = refusal(adapted_model("all-linear", base=experts))
    assert "shared_expert" in message
    assert "--target_modules" in message


def test_attention_of_a_mixture_of_experts_is_covered():
    """Experts are chosen token by token, so the other examples do not matter."""
    experts = tiny_model("mixtral", num_local_experts=4, experts_implementation="eager")
    assert_equals_reference(adapted_model(QKVO, base=experts), random_examples([19, 40, 3, 1, 26]))
