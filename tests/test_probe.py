"""The probe: it says whether an example's gradient is its own, and leaves nothing behind."""

import json
from dataclasses import replace

import pytest
import torch

import train
from privacy_checks.tiny_model import tiny_llama
from tests.helpers import adapted_model
from tests.training import flags, in_process, save_dataset
from utils.cli import UsageError
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.models.loading import load_base_model
from utils.row_dropout import RowMasks
from utils.runs.batching import Shapes
from utils.runs.probe import Numerics, probed

FIXED = Shapes(max_seq_len=48, token_budget=4 * 48, tokens=96)
FREE = replace(FIXED, tokens=None)


def couple(base, strength):
    """Scale all hidden states of a microbatch by their mean over it, as little as asked for."""

    def scaled(_module, _inputs, hidden):
        return hidden * (1 + strength * hidden.detach().mean())

    base.model.norm.register_forward_hook(scaled)
    return base


def probe(model):
    """What the probe says of an adapted model."""
    gradients = PerExampleGradients(model)
    language_model = LanguageModel(model.get_base_model())
    return probed(language_model, gradients, RowMasks(b"k"), FREE, FIXED, lambda number: number)


def test_a_tiny_model_is_exact_with_any_number_of_rows():
    shapes, numerics = probe(adapted_model(["q_proj", "v_proj"]))
    assert shapes == FREE
    assert numerics == Numerics(0.0, "cpu in float32")
    assert str(numerics) == "exact, probed on cpu in float32"


def test_a_coupling_of_more_than_a_hundredth_is_refused():
    base = couple(tiny_llama(), 10.0)
    with pytest.raises(UsageError, match="changes by .*% with the examples next to it, on cpu in"):
        probe(adapted_model(["q_proj", "v_proj"], base=base))


def test_an_embedding_of_zeros_for_padding_is_not_in_the_way():
    # A norm's derivative at zero is 1,000, and so is its power of 16.
    base = tiny_llama(num_hidden_layers=16, initializer_range=0.1)
    assert not base.get_input_embeddings().weight[base.config.pad_token_id].any()
    _, numerics = probe(adapted_model(["q_proj"], base=base))
    assert numerics.difference == 0


def test_a_gradient_that_is_not_finite_is_said():
    def infinite(_module, _inputs, hidden):
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("inf"))

    base = tiny_llama()
    base.model.norm.register_forward_hook(infinite)
    with pytest.raises(UsageError, match="gradient of made-up tokens is not finite on cpu in"):
        probe(adapted_model(["q_proj", "v_proj"], base=base))


def test_a_slight_coupling_fixes_the_rows_and_is_told():
    shapes, numerics = probe(adapted_model(["q_proj", "v_proj"], base=couple(tiny_llama(), 1e-2)))
    assert shapes == FIXED
    assert 1e-6 < numerics.difference < 1e-2
    assert str(numerics).startswith("not exact: an example's gradient follows its company by up to")
    assert f"{numerics.difference:.2g} of its norm" in str(numerics)


@pytest.mark.parametrize("strength", [0.0, 1e-2], ids=["exact", "not exact"])
def test_the_probe_leaves_adapters_gradients_and_generator_as_they_were(strength):
    model = adapted_model(["q_proj", "v_proj"], base=couple(tiny_llama(), strength))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    asks = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None, name
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == asks


def test_so_it_does_where_it_refuses():
    model = adapted_model(["q_proj", "v_proj"], base=couple(tiny_llama(), 10.0))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(UsageError):
        probe(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


# ---------------------------------------------------------------- runs


def prepared(monkeypatch):
    """The record of the next run before its first step, as a list that the run fills."""
    runs, prepare = [], train.prepare

    def watched(*given):
        runs.append(prepare(*given))
        return runs[-1]

    monkeypatch.setattr(train, "prepare", watched)
    return runs


@pytest.mark.parametrize("strength", [0.0, 1e-2], ids=["exact", "not exact"])
def test_a_report_and_its_page_say_what_the_probe_found(
    tiny_model_dir, tmp_path, monkeypatch, strength
):
    runs = prepared(monkeypatch)
    monkeypatch.setattr(
        train, "load_base_model", lambda *given: couple(load_base_model(*given), strength)
    )
    argv = flags(tiny_model_dir, save_dataset(tmp_path), tmp_path, "--num_epochs=0.25")
    assert in_process(train.main, argv) == 0
    report = json.loads((tmp_path / "job" / "privacy_report.json").read_text())
    numerics = report["numerics"]
    assert numerics.startswith("not exact" if strength else "exact, probed on cpu in float32")
    assert f"Numerics: {numerics}." in (tmp_path / "job" / "privacy_report.md").read_text()
    (run,) = runs
    assert (run.shapes.tokens is not None) is bool(strength)


def test_a_plain_run_is_not_probed_and_has_no_shapes(tiny_model_dir, tmp_path, monkeypatch):
    runs = prepared(monkeypatch)
    monkeypatch.setattr(train, "probed", None)
    argv = flags(tiny_model_dir, save_dataset(tmp_path), tmp_path, "--num_epochs=0.25", "--eps=-1",
                 dp=False)  # fmt: skip
    assert in_process(train.main, argv) == 0
    (run,) = runs
    assert run.shapes is None
    assert run.mechanism.numerics == "not probed"
