"""How much memory training takes by shapes: against what is kept, and what is measured."""

import ast
import dataclasses
import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from transformers import AutoConfig

from benchmarks import footprint as benchmark
from tests.helpers import adapted_model, tiny_model
from tests.paths import ROOT
from utils.dp_utils import PerExampleGradients
from utils.models.footprint import (
    ATTENTION,
    CARDS,
    GIB,
    LLAMA,
    USABLE_SHARE,
    Architecture,
    RowMemory,
    Training,
    remedy,
)
from utils.models.language_model import LanguageModel
from utils.models.memory import PeakMemory

THIRTEEN = Training(architecture=LLAMA["13b"], rank=8, max_seq_len=1024)


def memory_of(parameters) -> RowMemory:
    return RowMemory(1, 0, tuple((1, p.shape[1], p.shape[0]) for p in parameters.values()))


@pytest.mark.parametrize("rank", [2, 24])
@pytest.mark.parametrize("tokens", [2, 9, 40])
def test_a_row_keeps_what_the_hooks_keep(rank, tokens):
    model = adapted_model("all-linear", rank=rank)
    gradients = PerExampleGradients(model)
    language_model = LanguageModel(model.get_base_model())
    with gradients.capture(3):
        language_model.example_losses(language_model.public_batch(3, tokens))[0].sum().backward()
    kept = 0
    for layer in gradients._captured.values():
        tensors = [getattr(layer, n, None) for n in ("gradients", "inputs", "output_gradients")]
        kept += sum(each.numel() * each.itemsize for each in tensors if each is not None)
    assert kept == 3 * memory_of(gradients.parameters).kept(tokens)


def test_the_kept_gradients_of_short_rows_are_those_that_were_found():
    """4,096 tokens of a 13B model: rank 8 on attention, rank 64 on all linear layers."""
    for rank, targets, of_long, of_short in (
        (8, (), 0.2, 10.7), (64, ("all-linear",), 4, 64),
    ):  # fmt: skip
        row = dataclasses.replace(THIRTEEN, rank=rank, target_modules=targets).row
        assert 4 * row.kept(1024) / 1e9 == pytest.approx(of_long, rel=0.1)
        assert 4096 / 20 * row.kept(20) / 1e9 == pytest.approx(of_short, rel=0.1)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("mistral", {}),
        ("qwen3", {"head_dim": 16}),
        ("gpt2", {"n_inner": 64}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", {"intermediate_size": 128}),
    ],
)
def test_a_configuration_tells_the_shapes(model_type, settings):
    model = tiny_model(model_type, **settings)
    found = Architecture.of_config(json.loads(model.config.to_json_string(use_diff=False)))
    assert found is not None
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "emb" not in name and "wte" not in name and "wpe" not in name
        and "lm_head" not in name and "embed_out" not in name
    )  # fmt: skip
    counted = found.layers * sum(d_in * d_out for d_in, d_out in found.linears.values())
    assert counted == weights


def test_a_configuration_that_does_not_tell_them_is_known_as_such():
    assert Architecture.of_config({"hidden_size": 32}) is None
    nested = {"text_config": AutoConfig.for_model("llama").to_dict()}
    assert Architecture.of_config(nested) == LLAMA["7b"]


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [8, 256])
def test_the_most_sequences_fit_and_one_more_does_not(card, checkpointing, rank):
    for shape in LLAMA.values():
        run = Training(architecture=shape, rank=rank, max_seq_len=512, bits=4,
                       gradient_checkpointing=checkpointing)  # fmt: skip
        most = run.most_sequences(card)
        assert most == 0 or run.total(most) <= USABLE_SHARE * card * GIB
        assert run.total(most + 1) > USABLE_SHARE * card * GIB


def test_everything_that_takes_memory_raises_the_total_and_what_saves_it_lowers_it():
    total = THIRTEEN.total(4)
    more = {"rank": 16, "max_seq_len": 2048, "itemsize": 4, "units_at_once": 32, "copies": 4,
            "target_modules": ("all-linear",), "architecture": LLAMA["70b"]}  # fmt: skip
    less = {"bits": 8, "gradient_checkpointing": True, "shards": 4}
    for name, value in more.items():
        assert dataclasses.replace(THIRTEEN, **{name: value}).total(4) > total, name
    for name, value in less.items():
        assert dataclasses.replace(THIRTEEN, **{name: value}).total(4) < total, name
    # A that is frozen is there, without gradient, moments and noise.
    frozen = dataclasses.replace(THIRTEEN, frozen_a=True)
    no_a = frozen.trained * 4 * (1 + frozen.copies)
    assert no_a < frozen.adapters < THIRTEEN.adapters
    # The gradients of many examples count where activations are few.
    many = dataclasses.replace(THIRTEEN, rank=64, gradient_checkpointing=True)
    assert dataclasses.replace(many, is_private=False).total(4) < many.total(4)
    four = dataclasses.replace(THIRTEEN, bits=4).total(4)
    assert four < dataclasses.replace(THIRTEEN, bits=8).total(4)


def test_a_remedy_is_what_takes_least_from_the_run_and_fits():
    assert remedy(THIRTEEN, 64, 80) == f"--perdevice_bs {THIRTEEN.most_sequences(80)}"
    assert remedy(THIRTEEN, 4, 40) == "--perdevice_bs 1"
    long = dataclasses.replace(THIRTEEN, max_seq_len=4096)
    assert remedy(long, 4, 40).endswith("--gradient_checkpointing")
    assert remedy(THIRTEEN, 4, 24).endswith("--gradient_checkpointing --load_in_8bit")
    seventy = dataclasses.replace(THIRTEEN, architecture=LLAMA["70b"])
    assert remedy(seventy, 1, 40) is None
    assert "--load_in_8bit" in remedy(seventy, 1, 80)
    single = dataclasses.replace(THIRTEEN, itemsize=4)
    assert "--dtype bfloat16" in remedy(single, 1, 40)


# ---------------------------------------------------------------- the table


def test_the_documented_table_is_what_the_benchmark_prints(capsys, tmp_path):
    assert benchmark.main([f"--json={tmp_path / 'figures.json'}"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs" / "performance.md").read_text()
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert len(rows) == 3 * 3 * 2
    assert rows[0]["most_sequences"].keys() == {"24", "40", "80"}


def test_flags_choose_rows_and_columns(capsys):
    options = ["--model", "13b", "--card", "80", "--quantisation", "4bit", "--lora_r", "64",
               "--target_modules", "all-linear", "--max_seq_len", "2048"]  # fmt: skip
    assert benchmark.main(options) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.endswith("| layer | on 80 GiB |")
    assert [row.split(" | ")[0:3] for row in rows] == [["| 13b", "4", "no"], ["| 13b", "4", "yes"]]


# ---------------------------------------------------------------- against measurement

# How far the computed peak may be off the measured one.
TOLERANCE = 0.2
# Rank, target modules, rows, tokens, checkpointing.
CASES = [
    (*shape, checkpointing)
    for shape in (
        (8, "attention", 4, 512), (64, "all-linear", 4, 512),
        (8, "attention", 64, 32), (64, "all-linear", 64, 32),
    )
    for checkpointing in (False, True)
]  # fmt: skip


def peak_of(case) -> tuple[int, int]:
    """Bytes of the microbatch of a case beyond model and sum: measured and computed."""
    rank, targets, rows, tokens, checkpointing = case
    base = tiny_model(
        "llama", vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    names = list(ATTENTION) if targets == "attention" else targets
    model = adapted_model(names, rank=rank, base=base, checkpointing=checkpointing)
    gradients, language_model = PerExampleGradients(model), LanguageModel(base)
    run = Training(
        architecture=Architecture.of_config(base.config.to_dict()), rank=rank, max_seq_len=tokens,
        itemsize=4, target_modules=() if targets == "attention" else (targets,),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    total = torch.zeros(gradients.num_parameters)

    def step(count: int) -> None:
        with gradients.capture(count):
            batch = language_model.public_batch(count, tokens)
            language_model.example_losses(batch)[0].sum().backward()
        gradients.add_clipped_sum(total, 1.0, "flat")

    step(1)
    before = psutil.Process().memory_info().rss
    with PeakMemory(torch.device("cpu")) as memory:
        step(rows)
    return memory.peak - before, rows * run.row.of(tokens) + run.logits


@pytest.mark.slow
def test_the_computed_peak_is_the_measured_one():
    """In a process whose allocator gives back what is freed, so that the peak is what is in use."""
    script = "from tests.test_footprint import *; print([peak_of(case) for case in CASES])"
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True,
                          env=os.environ | environment, capture_output=True, text=True)  # fmt: skip
    peaks = ast.literal_eval(done.stdout.splitlines()[-1])
    ratios = {case: computed / measured for case, (measured, computed) in zip(CASES, peaks)}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), (ratios, peaks)
