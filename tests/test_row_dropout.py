"""Dropout whose masks follow the row: the same in any company, fresh everywhere else."""

import numpy as np
import pytest
import torch

import utils.row_dropout
from tests.helpers import adapted_model, random_examples
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.models.lora import use_row_dropout
from utils.row_dropout import RowDropout, RowMasks, kept

LENGTHS = [9, 30, 17, 4]


def masks_of(rows, *, step=0, layer=0, key=b"k", tokens=40, features=16, p=0.25):
    masks = RowMasks(key)
    masks.step, masks.rows = step, np.array(rows)
    return kept(torch.tensor(masks.seeds(layer)), tokens, features, p)


def test_a_mask_depends_on_its_row_alone_and_a_longer_one_begins_with_it():
    alone = masks_of([7])[0]
    assert torch.equal(masks_of([3, 7, 1])[1], alone)
    assert torch.equal(masks_of([3, 7], tokens=99)[1, :40], alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(masks_of([7])[0], alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", [{"step": 1}, {"layer": 1}, {"key": b"other"}, {"rows": [8]}])
def test_any_other_step_layer_key_or_row_has_another_mask(change):
    rows = change.pop("rows", [7])
    same = (masks_of([7]) == masks_of(rows, **change)).float().mean()
    # Two independent masks agree where both keep or both drop: 0.75² + 0.25².
    assert same.item() == pytest.approx(0.625, abs=0.08)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_as_many_entries_are_dropped_as_asked_evenly_over_rows_positions_and_features(p):
    masks = masks_of(range(200), tokens=50, features=20, p=p).float()
    assert masks.mean().item() == pytest.approx(1 - p, abs=0.005)
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = masks.mean(dim=axes)
        deviation = (p * (1 - p) * len(means) / masks.numel()) ** 0.5
        assert (means - (1 - p)).abs().max() < 5 * deviation


def test_entries_of_a_mask_do_not_depend_on_each_other():
    columns = masks_of(range(200), tokens=50, p=0.5).float().flatten(1)[:, :300]
    pairs = torch.corrcoef(columns.T).fill_diagonal_(0)
    assert pairs.abs().max() < 0.45  # six deviations


def test_without_a_key_the_masks_of_two_runs_differ():
    one, other = RowMasks(), RowMasks()
    one.rows = other.rows = np.arange(3)
    assert one.key != other.key
    assert not np.array_equal(one.seeds(0), other.seeds(0))


def test_values_keep_their_mean_and_evaluation_is_without_dropout():
    masks = RowMasks(b"k")
    masks.rows = np.arange(4)
    dropout = RowDropout(0.2, masks, 0)
    inputs = torch.ones(4, 500, 10)
    assert dropout(inputs).mean().item() == pytest.approx(1, abs=0.02)
    assert set(dropout(inputs).unique().tolist()) == {0.0, 1.25}
    assert dropout(inputs.bfloat16()).dtype == torch.bfloat16
    assert dropout.eval()(inputs) is inputs
    with pytest.raises(RuntimeError, match="3 examples pass, masks are of 4"):
        dropout.train()(inputs[:3])


def sums(model, masks, data, microbatches):
    """Clipped sums [microbatches, parameters], at a clip norm that no example reaches."""
    for module in model.modules():
        module._forward_hooks.clear()
    gradients = PerExampleGradients(model)
    language_model = LanguageModel(model.get_base_model())
    model.train()
    rows = []
    for examples in microbatches:
        masks.rows = np.array(examples)
        total = torch.zeros(gradients.num_parameters)
        with gradients.capture(len(examples)):
            losses, _ = language_model.example_losses(data.collate(masks.rows, 0))
            losses.sum().backward()
        gradients.add_clipped_sum(total, 1e9, "flat")
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_examples_gradient_is_the_same_in_any_company(checkpointing):
    data = random_examples(LENGTHS)
    model = adapted_model(["q_proj", "v_proj"], checkpointing=checkpointing, dropout=0.3)
    masks = RowMasks(b"k")
    by_place = sums(model, masks, data, [[0], [1], [2], [3]]).sum(0)
    by_place_together = sums(model, masks, data, [[3, 1, 0, 2]])[0]
    use_row_dropout(model, masks)
    apart = sums(model, masks, data, [[0], [1], [2], [3]]).sum(0)
    together = sums(model, masks, data, [[3, 1, 0, 2]])[0]
    assert (apart - together).norm() < 1e-5 * apart.norm()
    assert (by_place - by_place_together).norm() > 0.05 * by_place.norm()
    masks.step = 1
    assert (sums(model, masks, data, [[3, 1, 0, 2]])[0] - together).norm() > 0.05 * apart.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_queries_keys_and_values_of_a_layer_have_one_mask(checkpointing, monkeypatch):
    model = adapted_model(["q_proj", "k_proj", "v_proj", "o_proj"], checkpointing=checkpointing,
                          dropout=0.3)  # fmt: skip
    masks = RowMasks(b"k")
    use_row_dropout(model, masks)
    drawn = []
    monkeypatch.setattr(
        utils.row_dropout, "kept", lambda *given: drawn.append(given) or kept(*given)
    )
    sums(model, masks, random_examples(LENGTHS), [[0, 1, 2, 3]])
    # Two layers: one mask for what all three read, one for what the fourth reads.
    assert len(drawn) == 2 * 2 * (1 + checkpointing)
    of_layer = [layer.lora_dropout["default"] for layer in model.modules()
                if hasattr(layer, "lora_dropout")][:3]  # fmt: skip
    inputs = torch.ones(4, 5, 6)
    masks.rows = np.arange(4)
    first, *others = (dropout(inputs) for dropout in of_layer)
    assert all(other is first for other in others)
    # Another pass has other rows, and a copy of a tensor is another tensor.
    assert of_layer[1](inputs.clone()) is not first
    masks.rows = np.arange(4)
    assert masks.last_dropped is None
