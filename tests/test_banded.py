"""Correlated noise: its coefficients, sensitivity, groups and arithmetic."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from privacy_checks.randomness import repetition_p_value, scale_p_value
from utils.cli import UsageError
from utils.privacy import banded
from utils.privacy.accounting import approximate_noise_multiplier, calibrate_noise_multiplier
from utils.privacy.banded import (
    MOST_CHOSEN,
    CorrelatedNoise,
    band_coefficients,
    bands_to_try,
    best_bands,
    deviations,
    groups_of,
    participations,
    prefix_error,
    require_bands,
    require_sound,
)
from utils.secure_random import SecureRandom

# N, batch, delta, and (epsilon, bands, noise against white at most).
PAPER = (180_000, 4096, 5e-7, 439, [(2.86, 4, 0.94), (5.94, 8, 0.79), (8.0, 32, 0.71)])
SMALL = (5824, 256, 1e-5, 22, [(2.86, 4, 0.89), (5.94, 8, 0.80), (8.0, 16, 0.78)])


def matrix(coefficients, steps) -> np.ndarray:
    """C, lower-triangular and Toeplitz."""
    places = np.subtract.outer(np.arange(steps), np.arange(steps))
    padded = np.array([*coefficients, *[0.0] * steps])
    return np.where(places >= 0, padded[np.clip(places, 0, None)], 0.0)


# ---------------------------------------------------------------- coefficients


@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (2, 22), (5, 22), (22, 22), (8, 439), (3, 3)])
def test_no_column_is_longer_than_what_is_accounted_for(bands, steps):
    coefficients = band_coefficients(bands, steps)
    assert len(coefficients) == bands
    exact = sum(Fraction(value) ** 2 for value in coefficients)
    assert 0.998 < exact <= 1
    assert np.linalg.norm(matrix(coefficients, steps), axis=0).max() <= 1
    require_sound(coefficients)


def test_the_error_is_that_of_prefix_sums_and_the_search_lowers_it():
    steps = 40
    for bands in (1, 3, 8):
        coefficients = band_coefficients(bands, steps)
        noise = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix(coefficients, steps))
        error = np.sqrt((noise**2).sum() / steps)
        assert prefix_error(coefficients, steps) == pytest.approx(error)
        last = np.linalg.norm(np.linalg.inv(matrix(coefficients, steps))[-1])
        assert deviations(coefficients, steps) == pytest.approx((last, np.linalg.norm(noise[-1])))
        truncated = np.array([1, 1 / 2, 3 / 8, 5 / 16, 35 / 128, 63 / 256, 231 / 1024, 429 / 2048])
        truncated = truncated[:bands] / np.linalg.norm(truncated[:bands])
        assert error <= prefix_error(truncated, steps) * (1 + 1e-3)
        # No neighbour is better: the search has come to its end.
        for place in range(bands if bands > 1 else 0):
            for factor in (0.98, 1.02):
                other = np.array(coefficients)
                other[place] *= factor
                other *= np.linalg.norm(coefficients) / np.linalg.norm(other)
                assert prefix_error(other, steps) > error
    assert prefix_error((1.0,), 7) == pytest.approx(np.sqrt(4))


def against_white(case, epsilon, bands, calibrate=calibrate_noise_multiplier) -> float:
    """Noise on prefix sums over that of white noise at the same epsilon."""
    examples, batch, delta, steps, _ = case
    white = calibrate(epsilon, delta, batch / examples, steps)
    sigma = calibrate(epsilon, delta, bands * batch / examples, -(-steps // bands))
    error = sigma * prefix_error(band_coefficients(bands, steps), steps)
    return error / (white * prefix_error((1.0,), steps))


def test_noise_on_prefix_sums_is_less_than_white_noise_at_the_same_epsilon():
    (_, _, _, _, cases) = PAPER
    epsilon, bands, most = cases[1]
    assert against_white(PAPER, epsilon, bands, approximate_noise_multiplier) <= most


@pytest.mark.slow
@pytest.mark.parametrize("case", [PAPER, SMALL], ids=["paper", "small"])
def test_noise_is_less_at_every_size(case):
    for epsilon, bands, most in case[-1]:
        assert against_white(case, epsilon, bands) <= most


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 5.94])
@pytest.mark.parametrize("steps", [22, 23, 45])
def test_the_best_number_of_bands_has_the_least_error_of_all(epsilon, steps):
    case = (5824, 5824 // 23 if steps < 45 else 128, 1e-5, steps, [])
    examples, batch, delta, *_ = case
    most = min(steps, examples // batch)
    errors = [against_white(case, epsilon, b, approximate_noise_multiplier)
              for b in range(1, most + 1)]  # fmt: skip
    best = best_bands(epsilon, delta, examples, batch, steps)
    assert errors[best - 1] <= min(errors) * 1.01


def test_the_search_for_bands_tries_the_fewest_for_every_half_as_many_steps_again(monkeypatch):
    """All of them where one has the least, and none further once more noise is enough."""
    tried = []

    def noise(_epsilon, _delta, rate, times, _reserved, grid, most):
        bands = round(rate * 100)
        tried.append((bands, times))
        return min(most, abs(bands - 6) + 0.7)

    monkeypatch.setattr(banded, "approximate_noise_multiplier", noise)
    # Noise that is not worth it stays so, however least / error x error is rounded.
    for error in np.linspace(0.1, 1, 50):
        monkeypatch.setattr(banded, "prefix_error", lambda c, _, e=error: e + 0.01 * len(c))
        assert best_bands(1.0, 1e-5, 1000, 10, 12) == 6
    tried.clear()
    monkeypatch.setattr(banded, "prefix_error", lambda *_: 1.0)
    assert best_bands(1.0, 1e-5, 1000, 10, 12) == 6
    assert tried == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    tried.clear()
    best_bands(1.0, 1e-5, 1000, 300, 13)
    assert [bands for bands, _ in tried] == [90, 60, 30]  # 4 and more have too few to draw from
    tried.clear()
    # With fewer the sampling rate would be below what is accounted for.
    assert best_bands(1.0, 1e-5, 10**8, 300, 12) == 12
    assert [times for _, times in tried] == [1, 2, 3]
    assert bands_to_try(1, 1) == [1]
    assert bands_to_try(439, MOST_CHOSEN)[:3] == [63, 44, 30]
    assert MOST_CHOSEN == 64


@pytest.mark.parametrize(("bands", "steps"), [(2, 900), (2, 5000), (3, 5000), (4, 20_000)])
@pytest.mark.filterwarnings("error")
def test_few_bands_of_many_steps_are_searched_for_too(bands, steps):
    """A search that leaves where C^-1 stays bounded comes back with what it began with."""
    begun = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])
    found = prefix_error(band_coefficients(bands, steps), steps)
    assert found < 0.96 * prefix_error(begun / np.linalg.norm(begun), steps)


# ---------------------------------------------------------------- sensitivity


def executed(steps, restarts):
    """Steps in the order in which they were taken, and the process start of each.

    Args:
        restarts: {step at which a process ended: step from which the next one went on}.
    """
    order, start, step = [], 0, 0
    while step < steps:
        order.append((step, start))
        step += 1
        if step in restarts:
            step, start = restarts.pop(step), start + 1
    return order


RESTARTS = [{}, {5: 5}, {1: 1, 3: 3}, {7: 4}, {6: 5, 8: 2}]


@pytest.mark.parametrize("restarts", RESTARTS, ids=str)
@pytest.mark.parametrize("bands", [2, 3, 4])
def test_no_pattern_of_participation_moves_the_sums_by_more_than_is_accounted(bands, restarts):
    """Every group, every subset of its steps, every choice of signs; with crashes and restarts.

    What a unit adds to C G is the sum of c_t g_t' over its steps. For gradients of any dimension
    its norm is at most sqrt(times) if columns are orthogonal and no longer than 1, which holds for
    all g_t if it does for all pairs of steps.
    """
    order = executed(9, dict(restarts))
    starts = np.array([start for _, start in order])
    c = matrix(band_coefficients(bands, 9), len(order))
    c *= np.equal.outer(starts, starts)  # block-diagonal: it begins anew with a process
    accounted = participations([step + 1 for step, _ in order], bands)
    largest = 0.0
    for group in range(bands):
        places = [place for place, (step, _) in enumerate(order) if step % bands == group]
        columns = c[:, places]
        gram = columns.T @ columns
        assert np.array_equal(gram, np.diag(gram.diagonal()))
        assert gram.diagonal().max() <= 1
        for signs in itertools.product([-1.0, 0.0, 1.0], repeat=len(places)):
            largest = max(largest, float(np.sum((columns @ np.array(signs)) ** 2)))
    assert 0.7 * accounted < largest <= accounted


def test_participations_that_lie_closer_together_move_more():
    c = matrix(band_coefficients(4, 9), 9)
    squares = [np.linalg.norm(c[:, 0] + c[:, apart]) ** 2 for apart in (1, 2, 3, 4)]
    assert squares[0] > squares[1] > squares[2] > 2.05
    assert squares[3] <= 2


@pytest.mark.parametrize("bands", [1, 2, 5, 8])
def test_a_unit_takes_part_in_one_of_b_steps_and_in_each_that_is_taken_again(bands):
    for steps in (1, 7, 8, 22):
        assert participations(range(steps), bands) == -(-steps // bands)
    lost = [*range(1, 23), *range(19, 31)]  # 22 steps, and again from the 19th on
    counts = [sum(step % bands == group for step in lost) for group in range(bands)]
    assert participations(lost, bands) == max(counts)
    # A step that is lost again and again is one more for its group each time.
    assert participations([*range(1, 9), *[8] * 5], bands) == -(-8 // bands) + 5
    assert participations([], bands) == 0
    # Absurdly many steps are refused by the accountant, and not counted one by one.
    assert participations(range(10**15), bands) == -(-(10**15) // bands)


@pytest.mark.parametrize(
    ("coefficients", "sound"),
    [((1.0,), True), ((0.8, 0.6), True), ((0.8, 0.61), False), ((-0.8, 0.5), False),
     ((0.0, 0.5), False), ((float("nan"), 0.5), False)],
)  # fmt: skip
def test_columns_that_are_longer_are_refused(coefficients, sound):
    if sound:
        require_sound(coefficients)
    else:
        with pytest.raises(UsageError, match="squares add up to 1 at most"):
            require_sound(coefficients)


@pytest.mark.parametrize(("bands", "most"), [(6, 5), (0, 5), (9, 8)])
def test_more_bands_than_groups_can_fill_are_refused(bands, most):
    require_bands(most, 10 * most, 10, 8)
    with pytest.raises(UsageError, match=f"--bands {bands}: at most {most}"):
        require_bands(bands, 10 * most, 10, 8)


# ---------------------------------------------------------------- groups


def test_adding_or_removing_a_row_moves_no_other_to_another_group():
    keys = SecureRandom().uint64(500)
    groups = groups_of(keys, None, 7)
    assert set(groups.tolist()) == set(range(7))
    for gone in (0, 250, 499):
        left = np.delete(np.arange(500), gone)
        assert np.array_equal(groups_of(keys[left], None, 7), groups[left])
        # What follows a row's place does move, by the hundred.
        assert (np.arange(499) % 7 != left % 7).sum() == 499 - gone
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(groups_of(keys[order], None, 7), groups[order])


def test_adding_or_removing_a_unit_moves_no_other_to_another_group():
    keys = SecureRandom().uint64(300)
    of_row = np.random.default_rng(1).permutation(np.repeat(np.arange(60), 5))
    groups = groups_of(keys, of_row, 8)
    assert set(groups.tolist()) == set(range(8))
    for gone in (0, 59, 31):
        rows = np.flatnonzero(of_row != gone)
        renumbered = of_row[rows] - (of_row[rows] > gone)
        left = groups_of(keys[rows], renumbered, 8)
        assert np.array_equal(left, np.delete(groups, gone))


# ---------------------------------------------------------------- noise


def noise_of(coefficients, fresh) -> np.ndarray:
    """float64 [steps, parameters]."""
    noise = CorrelatedNoise(coefficients)
    return np.array([noise.following(t, torch.tensor(z)).numpy() for t, z in enumerate(fresh)])


def test_noise_is_the_inverse_of_c_on_fresh_noise():
    fresh = np.random.default_rng(2).normal(size=(30, 6))
    for bands in (1, 2, 7):
        coefficients = band_coefficients(bands, 30)
        expected = np.linalg.solve(matrix(coefficients, 30), fresh)
        assert np.allclose(noise_of(coefficients, fresh), expected, atol=1e-12)
    assert np.array_equal(noise_of((1.0,), fresh), fresh)  # white noise keeps its bits


def test_rounding_of_the_recurrence_stays_far_below_the_grid():
    """Against exact arithmetic: a cell of the grid is 2^-10 of a deviation."""
    rng, steps = np.random.default_rng(3), 300
    for bands in (4, 32):
        coefficients = band_coefficients(bands, steps)
        fresh = rng.normal(size=steps)
        exact: list[Fraction] = []
        for z in fresh:
            past = zip(coefficients[1:], reversed(exact))
            rest = sum((Fraction(c) * n for c, n in past), Fraction(0))
            # Rounded to 2^-200, or the fractions would grow without end.
            value = (Fraction(z) - rest) / Fraction(coefficients[0])
            exact.append(Fraction(round(value * 2**200), 2**200))
        found = noise_of(coefficients, fresh[:, None])[:, 0]
        worst = max(abs(Fraction(n) - e) for n, e in zip(found.tolist(), exact))
        assert worst < Fraction(2) ** -44


def test_the_correlation_is_what_c_says_and_nothing_repeats_elsewhere():
    coefficients = band_coefficients(4, 24)
    random = SecureRandom()
    first, second = (
        noise_of(coefficients, [random.gaussian(2000).numpy() for _ in range(24)]) for _ in range(2)
    )
    c = matrix(coefficients, 24)
    assert scale_p_value(c @ first) > 1e-5
    assert repetition_p_value(c @ first) > 1e-5
    assert repetition_p_value(first, second) > 1e-5
    # As it is, it is correlated, and has another scale.
    assert repetition_p_value(first) < 1e-5
    assert scale_p_value(first) < 1e-5


def test_it_begins_anew_with_an_object_and_refuses_steps_out_of_turn():
    coefficients = (0.8, 0.6)

    def ones():
        return torch.ones(3, dtype=torch.float64)

    noise = CorrelatedNoise(coefficients)
    first = noise.following(4, ones()).clone()  # a run may go on at any step
    assert not torch.equal(noise.following(5, ones()), first)
    for step in (5, 7, 0):
        with pytest.raises(RuntimeError, match=f"of step {step} cannot follow step 5"):
            noise.following(step, ones())
    assert torch.equal(CorrelatedNoise(coefficients).following(5, ones()), first)
