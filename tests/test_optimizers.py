"""AdamW that knows the noise, against its equation; what a checkpoint of it keeps."""

import numpy as np
import pytest
import torch

from utils.runs.optimizers import FLOOR, CorrectedAdamW, schedule

GRADIENTS = np.random.default_rng(0).normal(size=(20, 5))


def moved(make, gradients, *, stopped_at=None):
    """Where a tensor of zeros ends; with a stop, through a checkpoint's state."""
    tensor = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = make([tensor])
    for step, gradient in enumerate(gradients):
        if step == stopped_at:
            state = optimizer.state_dict()
            optimizer = make([tensor])
            optimizer.load_state_dict(state)
        tensor.grad = torch.from_numpy(gradient)
        optimizer.step()
    return tensor.detach().numpy()


def corrected(deviation, wd=0.0):
    return lambda tensors: CorrectedAdamW(tensors, 0.01, wd, deviation)


@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_without_noise_to_speak_of_it_is_adamw(wd):
    def adamw(tensors):
        return torch.optim.AdamW(tensors, lr=0.01, weight_decay=wd, eps=0.0)

    expected = moved(adamw, GRADIENTS)
    assert np.allclose(moved(corrected(1e-9, wd), GRADIENTS), expected, rtol=1e-9)


@pytest.mark.parametrize("deviation", [0.5, 3.0])
def test_a_weight_moves_as_the_equation_says(deviation):
    """In the second case the floor decides every step, in the first it decides some."""
    first, second, place, floored = np.zeros(5), np.zeros(5), np.zeros(5), 0
    for step, gradient in enumerate(GRADIENTS, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        left = second / (1 - 0.999**step) - deviation**2
        floored += int((left < FLOOR * deviation**2).sum())
        place -= 0.01 * first / (1 - 0.9**step) / np.sqrt(np.maximum(left, FLOOR * deviation**2))
    assert 0 < floored < GRADIENTS.size if deviation == 0.5 else floored == GRADIENTS.size
    assert np.allclose(moved(corrected(deviation), GRADIENTS), place, rtol=1e-9)


def test_what_the_noise_hides_moves_less_than_what_it_does_not():
    """Under much noise AdamW moves both weights by its ratio of signal to noise, as SGD would."""
    random, means, deviation = np.random.default_rng(1), np.array([1.0, 4.0]), 1.0
    gradients = means + deviation * random.normal(size=(2000, 2))
    slow, fast = -moved(corrected(deviation), gradients)
    assert fast / slow == pytest.approx(1, abs=0.1)  # the sign alone, as Adam without noise
    slow, fast = -moved(lambda tensors: torch.optim.AdamW(tensors, lr=0.01), gradients)
    assert fast / slow > 1.3


def test_it_goes_on_from_a_checkpoint():
    whole = moved(corrected(0.5), GRADIENTS)
    assert np.array_equal(moved(corrected(0.5), GRADIENTS, stopped_at=7), whole)


def rates(name, warmup, steps):
    """The rate of every step, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = schedule(name, optimizer, warmup, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_every_step_has_a_rate_and_the_peak_comes_after_the_warm_up():
    assert rates("constant", 3, 4) == [1.0] * 4
    assert rates("constant_with_warmup", 3, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", 1, 5) == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    halves = [(1 + np.cos(np.pi * step / 6)) / 2 for step in range(6)]
    assert rates("cosine", 3, 9) == pytest.approx([0.25, 0.5, 0.75, *halves])
    # A run of one step is not one at a rate of 0.
    assert rates("cosine", 1, 1) == [0.5]
