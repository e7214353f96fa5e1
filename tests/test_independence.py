"""Bases that couple examples: made silent, or refused by name."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from privacy_checks.observed_run import observe
from privacy_checks.replay import Replayed
from privacy_checks.tiny_model import byte_tokenizer, tiny_llama
from tests.helpers import tiny_model
from tests.mutated_train import observe_mutated_training
from utils.cli import UsageError
from utils.models import independence
from utils.models.independence import (
    require_independent_examples,
    require_no_other_randomness,
    silence_dropout,
)
from utils.models.loading import load_base_model, load_quantised_model
from utils.runs import probe

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the base's own dropout


def model_with_dropout(model_type):
    """A tiny model whose every dropout probability is 0.3."""
    model = tiny_model(model_type)
    for holder in (*model.modules(), model.config):
        for name in vars(holder):
            if name.endswith(("pdrop", "dropout")) and isinstance(vars(holder)[name], float):
                setattr(holder, name, 0.3)
        if isinstance(holder, nn.Dropout):
            holder.p = 0.3
    return model.train()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "opt", "falcon", "phi"])
def test_a_base_without_dropout_computes_the_same_twice(model_type):
    model = model_with_dropout(model_type)
    ids = torch.arange(3, 23)[None]

    def logits():
        return model(input_ids=ids).logits

    assert not torch.equal(logits(), logits())
    silence_dropout(model)
    assert torch.equal(logits(), logits())


EXAMPLES = 8


def largest_move(folder, model, *more):
    """How far leaving out one example moves the clipped sum of a real run, over C."""
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    rows = [
        {"instruction": "".join(random.choice(list("abcdef "), length))}
        for length in random.integers(1, 60, EXAMPLES)
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        f"--dataset_name={folder / 'letters.jsonl'}", f"--model_name={folder / 'model'}",
        f"--output_dir={folder}", "--prompt_style=uncond_generation", "--max_seq_len=100",
        "--perdevice_bs=4", "--loss_normalization=tokens", "--clip=0.25", "--eps=1e6",
        "--delta=1e-5", "--noise_multiplier=1", f"--total_bs={EXAMPLES}",
        f"--num_epochs={EXAMPLES}", "--insecure_fixed_noise_seed=0", *more,
    ]  # fmt: skip
    whole, without_one = (
        np.array(observe([*argv, f"--job_sess={out}"], Replayed, leaves_out=out).clipped_sums)
        for out in (False, True)
    )
    return float(np.linalg.norm(whole - without_one, axis=1).max() / 0.25)


def test_one_example_moves_the_sum_by_the_clip_norm_on_a_base_with_dropout(tmp_path):
    model = model_with_dropout("gpt2")
    assert largest_move(tmp_path, model) <= 1 + 1e-5


@pytest.mark.parametrize(
    ("old", "more"),
    [
        ("silence_dropout(base)", []),
        ("use_row_dropout(model, masks)", ["--lora_dropout=0.3"]),
    ],
)
def test_dropout_by_place_shows(tmp_path, monkeypatch, old, more):
    model = model_with_dropout("gpt2")
    with monkeypatch.context() as context:
        observe_mutated_training(context, old, "pass")
        with pytest.raises(UsageError, match="random numbers of its own"):
            largest_move(tmp_path / "refused", model, *more)
        context.setattr(independence, "require_no_other_randomness", lambda *_: None)
        observe_mutated_training(context, old, "pass")
        with pytest.raises(UsageError, match="changes by .* with the examples next to it"):
            largest_move(tmp_path / "probed", model, *more)
    monkeypatch.setattr(independence, "require_no_other_randomness", lambda *_: None)
    monkeypatch.setattr(probe, "LARGEST_DIFFERENCE", np.inf)
    observe_mutated_training(monkeypatch, old, "pass")
    assert largest_move(tmp_path, model_with_dropout("gpt2"), *more) > 1.05


ROUTERS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("model_type", "jitter", "draws"),
    [("mixtral", 0.1, True), ("mixtral", 0.0, False), ("phimoe", 0.01, True)],
)
def test_a_base_that_draws_random_numbers_of_its_own_is_refused(model_type, jitter, draws):
    model = tiny_model(model_type, **ROUTERS[model_type], router_jitter_noise=jitter)
    silence_dropout(model)

    def one_pass():
        model(input_ids=torch.arange(3, 23).view(2, 10))

    if draws:
        with pytest.raises(UsageError, match="random numbers of its own"):
            require_no_other_randomness(model, one_pass)
    else:
        require_no_other_randomness(model, one_pass)
    assert not model.training


def test_training_refuses_it_too(tmp_path):
    model = tiny_model("mixtral", **ROUTERS["mixtral"], router_jitter_noise=0.1)
    with pytest.raises(UsageError, match="random numbers of its own"):
        largest_move(tmp_path, model)


# ---------------------------------------------------------------- RoPE

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "fixed_up_to"), [(DYNAMIC, 64), (LONG, 32)], ids=["dynamic", "longrope"]
)
def test_rope_that_follows_the_longest_row_is_refused_beyond_its_length(rope, fixed_up_to):
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(UsageError, match=rf"kind {rope['rope_type']}.*--max_seq_len {fixed_up_to}"):
        require_independent_examples(model, fixed_up_to + 1)
    require_independent_examples(model, fixed_up_to)
    ids = torch.arange(3, 3 + fixed_up_to + 8)[None]
    short = ids[:, : fixed_up_to // 2]
    with torch.no_grad():
        before = model(input_ids=short).logits
        batch = torch.cat([ids, ids])
        # Up to the length nothing changes; beyond it a short row depends on a long one's presence.
        within = model(input_ids=batch[:, :fixed_up_to]).logits[0, : short.shape[1]]
        beyond = model(input_ids=batch).logits[0, : short.shape[1]]
    assert torch.allclose(within, before[0], atol=1e-5)
    assert not torch.allclose(beyond, before[0], atol=1e-5)


def test_other_rope_is_taken_at_any_length():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for rope in ({"rope_type": "default", "rope_theta": 10000.0}, linear):
        model = tiny_llama(rope_parameters=rope, max_position_embeddings=64)
        require_independent_examples(model, 10_000)


# ---------------------------------------------------------------- layers


def test_statistics_of_all_examples_are_refused():
    model = tiny_llama()
    model.model.layers[0].input_layernorm = nn.BatchNorm1d(32)
    with pytest.raises(UsageError, match="layers.0.input_layernorm is a BatchNorm1d"):
        require_independent_examples(model, 10)


def test_experts_of_limited_capacity_are_refused():
    model = tiny_llama()
    model.config.expert_capacity = 4
    with pytest.raises(UsageError, match="limited capacity"):
        require_independent_examples(model, 10)


class Packed(nn.Module):
    """A layer of a kind that nobody has looked at."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(4, 4, dtype=torch.int8))


def test_a_quantised_layer_of_an_unknown_kind_is_refused_by_name():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Packed()
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj is a Packed.*--load_in_4bit"):
        require_independent_examples(model, 10)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "fbgemm_fp8"])
def test_a_base_stored_by_another_method_is_refused_by_name(method):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(UsageError, match=f"quantised by {method}"):
        require_independent_examples(model, 10)


def test_weights_of_eight_bits_are_quantised_whether_floating_or_not():
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match="up_proj is a Linear, a quantised layer"):
        require_independent_examples(model, 10)


@pytest.mark.parametrize("bits", [4, 8])
def test_bases_that_are_quantised_here_are_taken(tiny_model_dir, bits):
    model = load_quantised_model(tiny_model_dir, torch.float32, bits, CPU)
    require_independent_examples(model, 10)


def test_a_base_stored_in_8_bits_with_a_threshold_is_refused(tiny_model_dir, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=config, device_map={"": CPU}
    )
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stored = load_base_model(str(tmp_path), torch.float32)
    with pytest.raises(UsageError, match="outlier threshold of 6"):
        require_independent_examples(stored, 10)
