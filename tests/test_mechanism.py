"""Who takes part in a step, what of them counts, and what is released."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from privacy_checks.randomness import (
    adjacent_p_value,
    batch_size_p_value,
    count_p_value,
    repetition_p_value,
    scale_p_value,
    whitened,
)
from tests.helpers import adapted_model
from tests.test_plan import small_plan
from utils.cli import UsageError
from utils.dp_utils import PerExampleGradients, add_noise, assign_gradient
from utils.models.language_model import LanguageModel
from utils.privacy import mechanism as mechanisms
from utils.privacy.banded import CorrelatedNoise, band_coefficients, groups_of
from utils.privacy.ledger import LEDGER_FILE
from utils.privacy.mechanism import (
    Plain,
    Private,
    clipping_summary,
    poisson_batch,
    shuffled_batch,
)
from utils.privacy.unit_sums import Units
from utils.row_dropout import RowMasks
from utils.secure_random import SecureRandom, grid_spacing

N, BATCH, STEPS = 400, 60, 600
TINY_PROBABILITY = 1e-6


def draw_matrix(draw) -> np.ndarray:
    """bool [steps, examples]: who was in which batch."""
    taken = np.zeros((STEPS, N), dtype=bool)
    for step in range(STEPS):
        taken[step, draw(step)] = True
    return taken


def poisson(_step):
    return poisson_batch(N, BATCH, SecureRandom())


def shuffler(step):
    return shuffled_batch(N, BATCH, seed=1, step=step)


def fixed_size(_step):
    return np.random.default_rng().choice(N, BATCH, replace=False)


def p_values(draw) -> list[float]:
    """Of the batch sizes, of each example's count, and of adjacent batches."""
    taken = draw_matrix(draw)
    tests = (batch_size_p_value, count_p_value, adjacent_p_value)
    return [test(taken, BATCH / N) for test in tests]


def test_poisson_draws_fit_the_binomial_in_size_count_and_time():
    assert min(p_values(poisson)) > TINY_PROBABILITY


def test_shuffled_epochs_fail_every_one_of_these():
    assert max(p_values(shuffler)) < TINY_PROBABILITY


def test_batches_of_a_fixed_size_fail_the_size_test():
    assert p_values(fixed_size)[0] < TINY_PROBABILITY


def test_poisson_takes_all_at_rate_one_and_may_take_none():
    assert poisson_batch(50, 50, SecureRandom()).tolist() == list(range(50))
    sizes = [len(poisson_batch(1000, 1, SecureRandom())) for _ in range(100)]
    assert 0 in sizes


def test_shuffled_batches_cover_each_epoch_once_and_depend_on_seed_and_step_alone():
    epoch = np.concatenate([shuffled_batch(30, 7, 3, step) for step in range(30)])
    assert len(epoch) == 210
    for start in range(0, 210, 30):
        assert sorted(epoch[start : start + 30]) == list(range(30))
    assert np.array_equal(shuffled_batch(30, 7, 3, 11), shuffled_batch(30, 7, 3, 11))
    assert not np.array_equal(shuffled_batch(30, 7, 3, 11), shuffled_batch(30, 7, 4, 11))


# ---------------------------------------------------------------- the mechanism


PLAN = small_plan(num_examples=40, expected_batch_size=10, clip_norm=0.05, noise_multiplier=0.8)


@pytest.fixture(scope="module")
def gradients():
    return PerExampleGradients(adapted_model(["q_proj", "v_proj"]))


@pytest.fixture
def private(gradients, tmp_path):
    mechanism = Private(PLAN, gradients, RowMasks(b"k"))
    mechanism.open(tmp_path)
    yield mechanism
    mechanism.close()


def captured(mechanism, gradients, model, examples):
    """A pass of a microbatch of public tokens, of so many rows or of these."""
    examples = np.arange(examples) if isinstance(examples, int) else examples
    with mechanism.capture(examples):
        sums, _ = LanguageModel(model.get_base_model()).example_losses(
            LanguageModel(model.get_base_model()).public_batch(len(examples))
        )
        sums.sum().backward()


OTHER_VALUES = {
    "num_examples": 41, "expected_batch_size": 9, "clip_norm": 0.07, "noise_multiplier": 0.9,
    "clip_function": "automatic", "loss_normalization": "max_seq_len",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_constant_comes_from_the_plan(name, gradients, tmp_path, monkeypatch):
    """A field that decides privacy, changed in the plan, reaches what the mechanism calls."""
    seen = []
    monkeypatch.setattr(
        "utils.privacy.mechanism.poisson_batch", lambda *given: seen.append(given[:2])
    )
    monkeypatch.setattr(
        "utils.privacy.mechanism.add_noise", lambda _, *given: seen.append(given[:2])
    )
    monkeypatch.setattr(
        PerExampleGradients,
        "add_clipped_sum",
        lambda _self, total, *given: seen.append(given) or total,
    )

    def used(plan, folder):
        seen.clear()
        mechanism = Private(plan, gradients, RowMasks(b"k"))
        mechanism.open(folder)
        mechanism.draw(0)
        mechanism.add(torch.zeros(1))
        mechanism.release(torch.zeros(1), 0)
        return [*seen, mechanism.divisor, mechanism.num_examples, mechanism.loss_normalization]

    changed = dataclasses.replace(PLAN, **{name: OTHER_VALUES[name]})
    assert used(PLAN, tmp_path / "a") != used(changed, tmp_path / "b")


def test_a_step_is_on_record_before_its_noise_is_used(private, tmp_path, monkeypatch):
    def lines():
        return (tmp_path / LEDGER_FILE).read_text().count("\n")

    def noising(*given):
        at_noise.append(lines())
        return add_noise(*given)

    at_noise = []
    monkeypatch.setattr("utils.privacy.mechanism.add_noise", noising)
    for step in range(3):
        private.release(torch.zeros(5), step)
    assert at_noise == [2, 3, 4]  # the plan, and a line a step
    steps = [json.loads(line).get("step") for line in (tmp_path / LEDGER_FILE).open()]
    assert steps == [None, 1, 2, 3]


def test_a_record_that_another_process_wrote_into_is_refused_at_the_end(private, tmp_path):
    private.release(torch.zeros(5), 0)
    assert private.report(1)["steps_taken"] == 1
    other = Private(PLAN, private.gradients, RowMasks(b"k"))
    other.open(tmp_path)
    other.release(torch.zeros(5), 1)
    with pytest.raises(UsageError, match="changed while the run was going on"):
        private.report(1)


def test_nothing_is_released_without_a_ledger(gradients):
    with pytest.raises(RuntimeError, match="nothing may be released"):
        Private(PLAN, gradients, RowMasks(b"k")).release(torch.zeros(5), 0)


def test_other_processes_release_nothing_of_the_sum(gradients):
    released = Private(PLAN, gradients, RowMasks(b"k"), is_main=False).release(torch.ones(5), 0)
    assert released.tolist() == [0.0] * 5
    assert released.dtype == torch.float64


def test_released_sums_have_the_plans_noise(private):
    noise = private.release(torch.zeros(100_000), 0) / (PLAN.noise_multiplier * PLAN.clip_norm)
    assert noise.std().item() == pytest.approx(1, abs=0.015)
    assert abs(noise.mean().item()) < 0.02


def test_draws_are_fresh_unless_the_seed_is_known(gradients, tmp_path):
    one, other = Private(PLAN, gradients, RowMasks(b"k")), Private(PLAN, gradients, RowMasks(b"k"))
    drawn = {tuple(mechanism.draw(0)) for mechanism in (one, one, other)}
    assert len(drawn) == 3
    known = [Private(PLAN, gradients, RowMasks(b"k"), known_seed=1) for _ in range(2)]
    assert known[0].draw(3).tolist() == known[1].draw(3).tolist()
    known[0].open(tmp_path)
    assert known[0].report(0)["guarantee"] is False


@pytest.mark.parametrize("rows", [[0, 1, 2], [3], [5, 5]], ids=["added", "not drawn", "twice"])
def test_a_row_that_was_not_drawn_or_is_in_the_sum_already_is_refused(gradients, rows):
    model = adapted_model(["q_proj", "v_proj"])
    mechanism = Private(PLAN, PerExampleGradients(model), RowMasks(b"k"))
    mechanism.expect(np.array([0, 1, 2, 5]), 1)
    total = torch.zeros(mechanism.gradients.num_parameters)

    def add(examples):
        captured(mechanism, None, model, np.array(examples))
        mechanism.add(total)

    add([0, 2])
    before = total.clone()
    with pytest.raises(RuntimeError, match="not drawn, or has been added"):
        add(rows)
    assert torch.equal(total, before)
    mechanism.expect(np.array(rows), 1)
    add(rows)


# ---------------------------------------------------------------- correlated noise


BANDED = small_plan(
    num_examples=N, expected_batch_size=BATCH, clip_norm=0.05, steps=STEPS, noise_multiplier=0.8,
    band_coefficients=band_coefficients(4, STEPS),
)  # fmt: skip


def banded(gradients, units=None, rows=N, plan=BANDED, **given):
    keys = np.random.default_rng(5).integers(0, 2**63, rows).astype(np.uint64)
    return Private(plan, gradients, RowMasks(b"k"), units, row_keys=keys, **given), keys


def test_steps_draw_from_one_group_after_another_at_b_times_the_rate(gradients):
    mechanism, keys = banded(gradients)
    taken = draw_matrix(mechanism.draw)
    groups = groups_of(keys, None, 4)
    for step, row in enumerate(taken):
        assert (groups[row] == step % 4).all()
    rate = 4 * BATCH / N
    for group in range(4):
        of_group = taken[group::4][:, groups == group]
        tests = (batch_size_p_value, count_p_value, adjacent_p_value)
        assert min(test(of_group, rate) for test in tests) > TINY_PROBABILITY
        assert batch_size_p_value(of_group, 0.9 * rate) < TINY_PROBABILITY
    # Nobody takes part twice within four steps.
    assert max(taken[start : start + 4].sum(axis=0).max() for start in range(STEPS - 3)) == 1


def test_who_is_in_which_group_is_the_same_after_a_restart(gradients):
    first, second = (banded(gradients)[0] for _ in range(2))
    before = {row for step in range(0, 40, 4) for row in first.draw(step).tolist()}
    after = {row for step in range(1, 41, 4) for row in second.draw(step).tolist()}
    assert not before & after
    assert before & {row for step in range(4, 40, 4) for row in second.draw(step).tolist()}


def test_units_of_a_group_are_drawn_with_rows_that_are_theirs(gradients):
    of_row = np.random.default_rng(6).permutation(np.repeat(np.arange(N), 3))
    of_units = {"unit_column": "user", "max_rows_per_unit": 2, "unit_sampling": "units"}
    plan = dataclasses.replace(BANDED, **of_units)
    mechanism, keys = banded(gradients, Units(of_row, 2), 3 * N, plan)
    groups = groups_of(keys, of_row, 4)
    for step in range(8):
        owners = of_row[mechanism.draw(step)]
        assert len(owners)
        assert (groups[owners] == step % 4).all()
        assert np.unique(owners, return_counts=True)[1].max() == 2


def fresh_noise(releases):
    """What the noise of releases of zeros was made of, where all are of one process start."""
    noise = torch.stack(releases).numpy() / (BANDED.noise_multiplier * BANDED.clip_norm)
    return whitened(noise, BANDED.coefficients)


def test_a_rehearsed_release_records_nothing_and_keeps_as_much_noise_as_steps_do(
    gradients, tmp_path, monkeypatch
):
    kept = []

    class Watched(CorrelatedNoise):
        def following(self, step, fresh):
            noise = super().following(step, fresh)
            kept.append(sum(past.nbytes for past in self._past))
            return noise

    monkeypatch.setattr(mechanisms, "CorrelatedNoise", Watched)
    mechanism, _ = banded(gradients)
    total = torch.zeros(gradients.num_parameters)
    assert mechanism.rehearse_release(total) > 0  # and there is no record yet
    rehearsed, kept[:] = kept[-1], []
    mechanism.open(tmp_path)
    for step in range(6):
        mechanism.release(total, step)
    mechanism.close()
    assert rehearsed == max(kept) == mechanism.bytes_of_past_noise > 0
    elsewhere, _ = banded(gradients, is_main=False)
    assert elsewhere.rehearse_release(total) == elsewhere.bytes_of_past_noise == 0


def test_released_sums_have_noise_that_c_makes_white_again(gradients, tmp_path):
    mechanism, _ = banded(gradients)
    mechanism.open(tmp_path)
    released = [mechanism.release(torch.zeros(3000), step) for step in range(12)]
    mechanism.close()
    # After a restart it begins anew: no noise of before is subtracted.
    again, _ = banded(gradients)
    again.open(tmp_path)
    resumed = [again.release(torch.zeros(3000), step) for step in range(12, 20)]
    again.close()
    for noise in (fresh_noise(released), fresh_noise(resumed)):
        assert min(scale_p_value(noise), repetition_p_value(noise)) > TINY_PROBABILITY
    assert repetition_p_value(fresh_noise(released), fresh_noise(resumed)) > TINY_PROBABILITY
    assert scale_p_value(fresh_noise([*released, *resumed])) < TINY_PROBABILITY
    cells = torch.stack(released) / grid_spacing(BANDED.noise_multiplier * BANDED.clip_norm)
    assert torch.equal(cells, cells.round())


def test_sum_and_noise_are_added_before_anything_is_rounded(gradients, tmp_path):
    """The noise of a step does not see the sums of any: it is the same for other data."""

    def released(sums, folder):
        mechanism, _ = banded(gradients, known_seed=3)
        mechanism.open(folder)
        return torch.stack([mechanism.release(total, step) for step, total in enumerate(sums)])

    spacing = grid_spacing(BANDED.noise_multiplier * BANDED.clip_norm)
    sums = [spacing * torch.randint(-50, 50, (200,)).float() for _ in range(6)]
    with_data = released(sums, tmp_path / "a")
    without = released([torch.zeros(200)] * 6, tmp_path / "b")
    assert torch.equal(with_data - without, torch.stack(sums).double())


def test_a_step_out_of_turn_is_not_released(gradients, tmp_path):
    mechanism, _ = banded(gradients)
    mechanism.open(tmp_path)
    mechanism.release(torch.zeros(5), 7)
    with pytest.raises(RuntimeError, match="of step 7 cannot follow step 7"):
        mechanism.release(torch.zeros(5), 7)


def test_a_record_with_a_crash_is_counted_by_groups(gradients, tmp_path):
    plan = dataclasses.replace(BANDED, expected_batch_size=100)  # all of a group
    mechanism, _ = banded(gradients, plan=plan)
    mechanism.open(tmp_path)
    for step in range(6):
        mechanism.release(torch.zeros(5), step)
    again, _ = banded(gradients, plan=plan)
    again.open(tmp_path)
    for step in range(5, 9):  # the sixth is taken again
        again.release(torch.zeros(5), step)
    report = again.report(9)
    assert (report["steps_lost"], report["participations"]) == (1, 3)
    assert "noise of 4 bands" in again.describe()


def test_masks_are_told_the_step_and_the_rows_on_every_process(gradients):
    masks = RowMasks(b"k")
    for rank in range(2):
        mechanism = Private(PLAN, gradients, masks, is_main=rank == 0)
        mechanism.begin(5, rank)
        mechanism.capture(np.array([3, 1]))
        assert (masks.step, masks.rows.tolist()) == (5, [3, 1])


def test_dropout_without_privacy_follows_from_seed_step_and_rank_alone():
    def seed(step, rank, seed=0):
        Plain({}, 40, 10, "tokens", seed).begin(step, rank)
        return torch.initial_seed()

    assert seed(3, 1) == seed(3, 1)
    assert len({seed(3, 1), seed(4, 1), seed(3, 0), seed(3, 1, 7)}) == 4


def test_a_changed_end_of_the_record_is_refused(private, gradients, tmp_path):
    private.release(torch.zeros(5), 0)
    head = private.head
    private.release(torch.zeros(5), 1)
    private.require_head(head)
    lines = (tmp_path / LEDGER_FILE).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER_FILE).write_text("".join(lines[:1]))
    again = Private(PLAN, gradients, RowMasks(b"k"))
    again.open(tmp_path)
    with pytest.raises(UsageError, match="truncated"):
        again.require_head(head)


def test_plain_sums_are_autograds_over_all_microbatches():
    model = adapted_model(["q_proj", "v_proj"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = Plain(parameters, 40, 10, "tokens", 0)
    total = torch.zeros(sum(p.numel() for p in parameters.values()))
    for _ in range(2):
        captured(plain, None, model, 3)
        assert plain.add(total).numel() == 0
    assert all(p.grad is None for p in parameters.values())
    captured(plain, None, model, 3)
    once = torch.cat([p.grad.flatten() for p in parameters.values()])
    assert torch.equal(total, 2 * once)
    assert plain.release(total, 0) is total
    assert plain.report(5)["guarantee"] is False


def test_a_tensor_without_a_gradient_adds_zeros():
    parameters = {
        "a": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Parameter(torch.zeros(4)),
        "c": torch.nn.Parameter(torch.zeros(2)),
    }  # fmt: skip
    assign_gradient(parameters, torch.arange(12.0))
    parameters["b"].grad = None
    total = torch.zeros(12)
    Plain(parameters, 40, 10, "tokens", 0).add(total)
    assert total.tolist() == [*range(6), 0, 0, 0, 0, 10, 11]


def test_norms_are_summed_up_without_those_that_are_not_finite():
    norms = [torch.tensor([1.0, 3.0]), torch.tensor([float("nan"), 2.0])]
    summary = clipping_summary(norms, 1.5)
    assert summary["non_finite"] == 1
    assert summary["clipped_fraction"] == pytest.approx(2 / 3)
    assert summary["norm_quantiles_10_50_90"][1] == 2.0
    assert clipping_summary([], 1.5) == {}
    assert clipping_summary([torch.tensor([float("inf")])], 1.5) == {"non_finite": 1}
