"""The frozen base: quantised, and what adapters trained on it are good for."""

import importlib.util
import json
import re

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd import _functions as kernels

import train
from tests.helpers import (
    adapted_model,
    clipped_sum,
    random_examples,
    reference_sum,
    relative_error,
)
from tests.training import flags, in_process, save_dataset
from utils.cli import UsageError
from utils.models import loading
from utils.models.loading import load_base_model, load_quantised_model, model_fingerprint
from utils.models.lora import load_adapted

CPU = torch.device("cpu")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def quantised(tiny_model_dir, bits):
    return load_quantised_model(tiny_model_dir, torch.float32, bits, CPU)


def dequantised(model, tiny_model_dir):
    """An ordinary model with the weights that the quantised one stands for."""
    plain = load_base_model(tiny_model_dir, torch.float32)
    changed = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                value = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                value = weight.data.float() * weight.SCB[:, None] / 127
            else:
                continue
            plain.get_submodule(name).weight.copy_(value)
            changed += 1
    assert changed == 14  # every projection of two layers
    return plain


@pytest.mark.parametrize("targets", [QKVO, "all-linear"], ids=["attention", "all-linear"])
@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.03, 0.5), (8, 0.002, 0.05)])
def test_gradients_on_a_quantised_base_are_those_on_the_same_base_dequantised(
    tiny_model_dir, bits, least, most, targets
):
    data = random_examples([19, 40, 3, 1, 26])
    base = quantised(tiny_model_dir, bits)
    plain = adapted_model(targets, base=dequantised(base, tiny_model_dir))
    model = adapted_model(targets, base=base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, norms = reference_sum(plain, data, 1.0)
    clip_norm = norms.median().item()
    expected, _ = reference_sum(plain, data, clip_norm)
    for budget in (40, 10_000):
        total, _ = clipped_sum(model, data, clip_norm, budget=budget)
        assert relative_error(total, expected) < 1e-5
    # It was quantised, and no further away than that: 16 levels of a normal distribution leave
    # about 9% of each weight's deviation, 255 of a row's range about 1%.
    full = adapted_model(targets, base=load_base_model(tiny_model_dir, torch.float32))
    unquantised, _ = reference_sum(full, data, clip_norm)
    assert least < relative_error(total, unquantised) < most


@pytest.mark.parametrize(("threshold", "holds"), [(None, True), (6.0, False)])
def test_eight_bits_let_no_example_change_another(tiny_model_dir, monkeypatch, threshold, holds):
    """LLM.int8's treatment of large features would: it looks at the whole microbatch."""
    # Training on a GPU takes this path; on the CPU activations are not quantised.
    monkeypatch.setattr(kernels, "MatMul8bitFp", kernels.MatMul8bitLt)
    base = quantised(tiny_model_dir, 8)
    for layer in base.model.layers:
        layer.input_layernorm.weight.data *= 4  # some features pass 6, in some tokens
    for module in base.modules():
        if threshold and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.state.threshold = threshold
    model = adapted_model(QKVO, base=base)
    data, clip_norm = random_examples([12, 12, 12, 12]), 1e-3
    everyone, _ = clipped_sum(model, data, clip_norm)
    moves = []
    for left_out in range(4):
        rest = [index for index in range(4) if index != left_out]
        total, _ = clipped_sum(model, data, clip_norm, indices=torch.tensor(rest).numpy())
        moves.append((everyone - total).norm().item() / clip_norm)
    assert (max(moves) <= 1 + 1e-5) == holds, moves


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    data = save_dataset(tmp_path)

    def call(*more):
        short = ["--num_epochs=0.3", "--no_eval_at_start"]
        argv = flags(tiny_model_dir, data, tmp_path / "out", *short, *more)
        assert in_process(train.main, argv) == 0
        return tmp_path / "out" / "job"

    return call


def test_an_adapter_of_a_quantised_base_samples_on_the_base_as_it_is(run, tiny_model_dir):
    folder = run("--load_in_4bit")
    info = json.loads((folder / "adapter" / "training_style.json").read_text())
    base = load_base_model(tiny_model_dir, torch.float32)
    assert info["base_model_bits"] == 4
    assert info["base_model_fingerprint"] == model_fingerprint(base)
    config = json.loads((folder / "run_config.json").read_text())
    assert config["lora_target_modules"] == sorted(QKVO)
    adapted = load_adapted(tiny_model_dir, folder / "adapter", torch.float32, merge=True)
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(adapted.get_parameter(weight), base.get_parameter(weight))
    with pytest.raises(UsageError, match="--load_in_4bit True, not False"):
        run("--resume=auto")


def test_without_bitsandbytes_the_message_says_what_to_install(tiny_model_dir, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(UsageError, match="--load_in_8bit: pip install bitsandbytes"):
        quantised(tiny_model_dir, 8)


def test_a_device_that_cannot_quantise_is_one_line(tiny_model_dir, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("None of the available devices\nare supported")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    expected = f"--load_in_4bit: bitsandbytes cannot quantise {tiny_model_dir!r} on cpu: None of"
    with pytest.raises(UsageError, match=re.escape(expected)) as refused:
        quantised(tiny_model_dir, 4)
    assert "\n" not in str(refused.value)
