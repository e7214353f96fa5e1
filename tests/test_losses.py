"""The chunked per-example loss against the model's own logits."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

import utils.models.losses
from privacy_checks.tiny_model import tiny_llama
from tests.helpers import random_examples
from utils.models.language_model import LanguageModel
from utils.models.losses import normalise, token_losses

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def own_losses(model, data):
    """Summed token losses of every example from the model's own logits, one at a time."""
    rows = []
    for index in range(len(data)):
        ids = torch.tensor(data.ids[data.offsets[index] : data.offsets[index + 1]]).long()
        first = max(1, int(data.loss_starts[index]))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        rows.append(losses[first - 1 :].sum())
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 10_000])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_tokens, monkeypatch):
    monkeypatch.setattr(utils.models.losses, "CHUNK_ELEMENTS", 259 * chunk_tokens)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 259, bias=False)
    targets = torch.randint(259, (40,))
    weights = torch.rand(40)
    hidden = torch.randn(40, 16, requires_grad=True)
    losses = token_losses(hidden, targets, [12, 0, 28], head, 259)
    (losses * weights).sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    expected = F.cross_entropy(head(plain), targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(hidden.grad, plain.grad, atol=1e-6)
    assert torch.allclose(losses, expected, atol=1e-6)


def test_losses_equal_the_models_own_in_any_batch():
    model = tiny_llama()
    data = random_examples([30, 4, 17, 2, 1], loss_starts=[0, 2, 9, 1, 0])
    expected = own_losses(model, data)
    language_model = LanguageModel(model)
    for indices in ([0, 1, 2, 3, 4], [4], [1, 3], [2, 0]):
        sums, counts = language_model.example_losses(data.collate(torch.tensor(indices).numpy(), 0))
        assert torch.allclose(sums, expected[indices], atol=1e-4)
        assert counts.tolist() == [[29, 2, 8, 1, 0][index] for index in indices]


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, final_logit_softcapping=3.0),
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=5.0),
        CohereConfig(**SIZES, logit_scale=0.3),
    ],
    ids=["soft-cap", "divisor", "factor"],
)
def test_scaled_and_capped_heads_are_exact(config, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)
    data = random_examples([12, 5])
    language_model = LanguageModel(model)
    assert capsys.readouterr().err == ""  # no fall-back was needed
    sums, _ = language_model.example_losses(data.collate(torch.arange(2).numpy(), 0))
    assert torch.allclose(sums, own_losses(model, data), rtol=1e-5)


def test_an_unknown_head_falls_back_to_the_models_own(capsys):
    class Doubled(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(tiny_llama().config).eval()
    data = random_examples([12, 5])
    sums, _ = LanguageModel(model).example_losses(data.collate(torch.arange(2).numpy(), 0))
    assert "its own head is used" in capsys.readouterr().err
    assert torch.allclose(sums, own_losses(model, data), rtol=1e-5)


def test_normalisation_is_by_a_public_constant_or_by_the_examples_own_tokens():
    sums, counts = torch.tensor([6.0, 0.0]), torch.tensor([3, 0])
    assert normalise(sums, counts, "max_seq_len", 64).tolist() == [6 / 64, 0]
    assert normalise(sums, counts, "tokens", 64).tolist() == [2, 0]
