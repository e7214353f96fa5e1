"""Rows of a unit: which of them a step takes, and what they add to its sum together."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tests.helpers import (
    adapted_model,
    random_examples,
    reference_gradients,
    relative_error,
)
from utils.dp_utils import PerExampleGradients
from utils.models.language_model import LanguageModel
from utils.models.losses import normalise
from utils.privacy.unit_sums import UNITS_AT_ONCE, Units, UnitSums
from utils.runs.batching import Cost, Shapes, cut_microbatches, deal_parts
from utils.secure_random import SecureRandom

TINY_PROBABILITY = 1e-6
# Rows of seven units lie between one another.
OWNERS = np.array([3, 0, 1, 0, 2, 0, 4, 1, 0, 5, 4, 0, 6, 6, 0])
LENGTHS = [5, 40, 17, 3, 29, 8, 40, 2, 11, 1, 23, 9, 30, 31, 14]
SHAPES = Shapes(max_seq_len=64, token_budget=256, tokens=128)


# ---------------------------------------------------------------- which rows


def test_a_unit_gives_at_most_k_rows_of_its_own_and_all_where_it_has_no_more():
    units = Units(OWNERS, 3)
    assert len(units) == 7
    rows = units.rows_of(np.array([0, 1, 4, 5]), SecureRandom())
    assert OWNERS[rows].tolist() == [0, 0, 0, 1, 1, 4, 4, 5]
    assert len(set(rows.tolist())) == len(rows)
    assert sorted(rows[3:].tolist()) == [2, 6, 7, 9, 10]
    every = Units(OWNERS, 6).rows_of(np.arange(7), SecureRandom())
    assert sorted(every.tolist()) == list(range(15))
    assert len(units.rows_of(np.zeros(0, dtype=np.int64), SecureRandom())) == 0


def subset_p_value(rows_of) -> float:
    """That all pairs of the six rows of unit 0 are equally likely, by a chi-square test."""
    pairs = dict.fromkeys(itertools.combinations(np.flatnonzero(OWNERS == 0).tolist(), 2), 0)
    for _ in range(3000):
        pairs[tuple(sorted(rows_of()))] += 1
    return stats.chisquare(list(pairs.values())).pvalue


def test_every_subset_of_k_rows_is_equally_likely_and_fresh_at_every_call():
    random, units = SecureRandom(), Units(OWNERS, 2)
    fair = subset_p_value(lambda: units.rows_of(np.array([0, 3]), random)[:2].tolist())
    assert fair > TINY_PROBABILITY
    own, numpy_random = np.flatnonzero(OWNERS == 0), np.random.default_rng()

    def neighbours():
        start = numpy_random.integers(6)
        return own[[start, (start + 1) % 6]].tolist()

    def favourites():
        return numpy_random.choice(own, 2, replace=False, p=[0.3, *[0.14] * 5]).tolist()

    assert subset_p_value(neighbours) < TINY_PROBABILITY
    assert subset_p_value(favourites) < TINY_PROBABILITY


# ---------------------------------------------------------------- what they add


def of_shapes(part: np.ndarray, lengths: np.ndarray) -> list:
    ((*cuts,),) = cut_microbatches(part, lengths, SHAPES.token_budget, shapes=SHAPES)
    assert any(cut.rows > len(cut.examples) for cut in cuts)  # empty rows
    return [(cut.examples, cut.rows, cut.tokens) for cut in cuts]


def small(part: np.ndarray, lengths: np.ndarray) -> list:
    ((*cuts,),) = cut_microbatches(part, lengths, 60)
    return [(cut.examples, cut.rows, cut.tokens) for cut in cuts]


def whole(part: np.ndarray, _lengths: np.ndarray) -> list:
    return [(part, len(part), None)]


CUTS = {
    "whole": whole, "small": small, "shapes": of_shapes,
    "one by one": lambda part, _lengths: [(row[None], 1, None) for row in part],
}  # fmt: skip


class Summing:
    """A model, data, and sums of units over them."""

    # A row, and what one number of its gradient is to be.
    poison = None

    def __init__(self, lengths=None, owners=OWNERS, *, rank=4, starts=None, **lora):
        self.data = random_examples(lengths or LENGTHS, starts)
        self.model = adapted_model("all-linear", rank=rank, **lora)
        self.gradients = PerExampleGradients(self.model)
        self.sums = UnitSums(Units(owners, len(owners)))
        self.language_model = LanguageModel(self.model.get_base_model())

    def pass_microbatch(self, total, examples, rows, tokens, clip_norm=1.0, function="flat"):
        batch = self.data.collate(examples, 0, rows=rows, tokens=tokens)
        with self.gradients.capture(rows):
            sums, counts = self.language_model.example_losses(batch)
            normalise(sums, counts, "max_seq_len", 64).sum().backward()
        if self.poison:
            row, value = self.poison
            for place in np.flatnonzero(examples == row):
                next(iter(self.gradients._captured.values())).gradients[place, 0] = value
        return self.sums.add(self.gradients, examples, total, clip_norm, function)

    def step(self, rows, cut=whole, clip_norm=1.0, function="flat"):
        """The sum of all units, and their norms in the order in which they became whole."""
        total, norms = torch.zeros(self.gradients.num_parameters), []
        for part in self.sums.expect(rows, 1):
            for microbatch in cut(part, self.data.lengths):
                norms.append(self.pass_microbatch(total, *microbatch, clip_norm, function))
        self.sums.require_whole()
        return total, torch.cat(norms)


def unit_by_unit(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(OWNERS[rows], kind="stable")]


def reference_means(summing, rows, owners=OWNERS):
    """Mean gradients of the units in float64 [units, parameters], and their norms."""
    each = reference_gradients(summing.model, summing.data)[rows]
    of_rows = torch.from_numpy(owners[rows])
    means = torch.stack([each[of_rows == unit].mean(0) for unit in of_rows.unique()])
    return means, means.norm(dim=1)


ALL_ROWS = unit_by_unit(np.arange(len(OWNERS)))
SOME_ROWS = unit_by_unit(np.array([8, 0, 3, 13, 11, 10, 4, 12]))


@pytest.mark.parametrize("rank", [4, 32], ids=["instantiated", "ghost norms of short rows"])
@pytest.mark.parametrize("rows", [ALL_ROWS, SOME_ROWS], ids=["all rows", "some rows"])
@pytest.mark.parametrize("starts", [None, [length // 2 for length in LENGTHS]], ids=["A", "C"])
@pytest.mark.parametrize("function", ["flat", "automatic"])
def test_the_sum_is_that_of_clipped_means_however_it_is_cut(rank, rows, starts, function):
    summing = Summing(rank=rank, starts=starts)
    means, expected_norms = reference_means(summing, rows)
    clip_norm = float(expected_norms[expected_norms > 0].median())  # some are clipped, some not
    if function == "automatic":
        factors = clip_norm / (expected_norms + 0.01)
    else:
        factors = (clip_norm / expected_norms).clamp(max=1)
    expected = (means * factors[:, None]).sum(0)
    for name, cut in CUTS.items():
        total, norms = summing.step(rows, cut, clip_norm, function)
        assert relative_error(total, expected) < 1e-5, name
        sorted_norms = norms.double().sort().values
        assert torch.allclose(sorted_norms, expected_norms.sort().values, rtol=1e-5), name


def test_checkpointing_changes_nothing():
    plain, again = Summing(), Summing(checkpointing=True)
    total, norms = plain.step(ALL_ROWS, of_shapes)
    other, other_norms = again.step(ALL_ROWS, of_shapes)
    assert torch.allclose(total, other, atol=1e-7)
    assert torch.allclose(norms, other_norms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cut", CUTS)
def test_a_row_that_is_not_finite_makes_its_unit_add_exactly_zero(value, cut):
    summing = Summing()
    summing.poison = 5, value  # one of six rows of unit 0
    total, norms = summing.step(ALL_ROWS, CUTS[cut])
    assert (~torch.isfinite(norms)).sum() == 1
    summing.poison = None
    others, _ = summing.step(ALL_ROWS[OWNERS[ALL_ROWS] != 0], CUTS[cut])
    assert torch.allclose(total, others, rtol=0, atol=1e-7)
    # Nothing of it stays in the place that another unit gets.
    means, norms = reference_means(summing, ALL_ROWS)
    expected = (means * (1 / norms).clamp(max=1)[:, None]).sum(0)
    assert relative_error(summing.step(ALL_ROWS, CUTS[cut])[0], expected) < 1e-5


def kept_sum(summing, rows, unit) -> torch.Tensor:
    """What is kept for a unit when its last row has passed, before it is clipped."""
    kept, finish = {}, summing.sums._finish

    def watched(owner, *more):
        kept[owner] = summing.sums._sums[summing.sums._slots[owner]].clone()
        return finish(owner, *more)

    summing.sums._finish = watched
    summing.step(rows, of_shapes)
    summing.sums._finish = finish
    return kept[unit]


@pytest.mark.parametrize("unit", [0, 4, 6])
def test_a_unit_is_the_same_to_the_last_bit_whatever_other_units_there_are(unit):
    # Lengths of which several units have rows, so that the same shapes are shared.
    summing = Summing([12, 40, 9, 3, 12, 40, 11, 12, 12, 40, 10, 9, 12, 40, 12])
    with_all = kept_sum(summing, ALL_ROWS, unit)
    own = np.flatnonzero(np.equal(OWNERS, unit))
    assert torch.equal(kept_sum(summing, own, unit), with_all)
    others = [other for other in range(7) if other != unit]
    for left_out in others:
        rows = ALL_ROWS[OWNERS[ALL_ROWS] != left_out]
        assert torch.equal(kept_sum(summing, rows, unit), with_all)
    assert with_all.norm() > 0


@pytest.mark.parametrize("clip_norm", [0.5, 1e4])
def test_the_norm_of_a_million_numbers_is_exact(clip_norm):
    parameters, values = 1_000_000, torch.tensor([0.1, 3.0])

    class Constant:
        def add_examples(self, sums, places):
            sums[places] += values[:, None]

    sums = UnitSums(Units(np.arange(2), 1))
    sums.expect(np.arange(2), 1)
    total = torch.zeros(parameters)
    norms = sums.add(Constant(), np.arange(2), total, clip_norm, "flat")
    true = values.double() * parameters**0.5
    assert torch.allclose(norms.double(), true, rtol=1e-6)
    expected = true.clamp(max=clip_norm).sum().item()
    assert total.double().norm().item() == pytest.approx(expected, rel=1e-6)


def test_more_units_at_once_than_have_room_at_first():
    owners = np.tile(np.arange(UNITS_AT_ONCE + 9), 2)  # second rows come after all first ones
    lengths = np.random.default_rng(0).integers(2, 20, len(owners)).tolist()
    summing = Summing(lengths, owners)
    grouped = np.argsort(owners, kind="stable")
    means, norms = reference_means(summing, grouped, owners)
    clip_norm = float(norms.median())
    summing.sums.expect(grouped, 1)
    total = torch.zeros(summing.gradients.num_parameters)
    finished = [
        len(summing.pass_microbatch(total, half, len(half), None, clip_norm))
        for half in np.split(np.arange(len(owners)), 2)
    ]
    assert finished == [0, UNITS_AT_ONCE + 9]
    summing.sums.require_whole()
    expected = (means * (clip_norm / norms).clamp(max=1)[:, None]).sum(0)
    assert relative_error(total, expected) < 1e-5


def test_a_unit_that_is_not_whole_is_refused_and_the_next_step_knows_nothing_of_it():
    summing = Summing()
    fresh, _ = Summing().step(SOME_ROWS)
    summing.sums.expect(ALL_ROWS, 1)
    total = torch.zeros(summing.gradients.num_parameters)
    summing.pass_microbatch(total, ALL_ROWS[:3], 3, None)
    with pytest.raises(RuntimeError, match="1 units have not all of their rows"):
        summing.sums.require_whole()
    assert torch.equal(summing.step(SOME_ROWS)[0], fresh)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_units", [1, 2, UNITS_AT_ONCE, 2 * UNITS_AT_ONCE + 1, 200])
def test_parts_hold_whole_units_of_which_each_passes_on_one_process(num_ranks, num_units):
    random = np.random.default_rng(num_units)
    owners = np.sort(random.integers(0, num_units, 4 * num_units))
    owners = np.unique(owners, return_inverse=True)[1]
    lengths = random.integers(1, 60, len(owners))
    rows = np.arange(len(owners))
    sums = UnitSums(Units(owners, len(owners)))
    parts = sums.expect(rows, num_ranks)
    assert np.concatenate(parts).tolist() == rows.tolist()
    of_parts = [set(owners[part].tolist()) for part in parts]
    assert sum(map(len, of_parts)) == len(set(owners.tolist()))  # no unit is in two parts
    assert max(map(len, of_parts)) <= UNITS_AT_ONCE
    assert len(parts) >= min(num_ranks, len(set(owners.tolist())))
    ranks = deal_parts(parts, lengths, 256, num_ranks, SHAPES)
    assert len(ranks) == num_ranks
    seen = [
        np.concatenate([cut.examples for cut in cuts] or [np.zeros(0, dtype=np.int64)])
        for cuts in ranks
    ]
    assert sorted(np.concatenate(seen).tolist()) == rows.tolist()
    of_ranks = [set(owners[rows].tolist()) for rows in seen]
    assert sum(map(len, of_ranks)) == len(set.union(*of_ranks))  # no unit is on two ranks


def test_parts_are_dealt_by_what_they_cost_launches_included():
    """Three short rows in three microbatches cost more than a long one where launching does."""
    lengths = np.array([8, 16, 24, 64, 8])
    parts = [np.array([0, 1, 2]), np.array([3]), np.array([4])]
    shapes = Shapes(max_seq_len=64, token_budget=256, tokens=None)
    for cost, last in ((Cost(0), 0), (Cost(1000), 1)):
        ranks = deal_parts(parts, lengths, 256, 2, shapes, cost)
        assert [cut.examples.tolist() for cut in ranks[last]][-1] == [4]


def test_a_step_that_drew_nobody_has_no_parts_and_is_whole():
    sums = UnitSums(Units(OWNERS, 2))
    assert sums.expect(np.zeros(0, dtype=np.int64), 2) == []
    sums.require_whole()
