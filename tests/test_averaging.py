"""Averages over steps: their values, whatever stopped the run, and what stands in place of what."""

import numpy as np
import pytest
import torch

from utils.runs.averaging import Average

STEPS = 10
PATH = np.random.default_rng(0).normal(size=(STEPS, 3)).astype(np.float32)


def averaged(rule, *, stopped_at=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The average of PATH and the last parameters; with a stop, through a checkpoint's state."""
    parameters = {"w": torch.nn.Parameter(torch.full((3,), 100.0))}
    average = Average(rule, parameters, STEPS)
    for step, values in enumerate(PATH, start=1):
        with torch.no_grad():
            parameters["w"].copy_(torch.from_numpy(values))
        average.update(step)
        if step == stopped_at:
            state = average.state_dict()
            state["mean"] = {name: tensor.clone() for name, tensor in state["mean"].items()}
            average = Average(rule, parameters, STEPS)
            average.load_state_dict(state)
    with average.in_place():
        mean = parameters["w"].detach().clone()
    return mean, parameters["w"].detach()


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("ema:0.9", 0.9 ** np.arange(STEPS)[::-1]),
        ("ema:0.5", 0.5 ** np.arange(STEPS)[::-1]),
        ("tail:0.5", np.arange(STEPS) >= 5),
        ("tail:0.31", np.arange(STEPS) >= 6),
        ("tail:0.01", np.arange(STEPS) >= 9),
        ("tail:1", np.ones(STEPS)),
    ],
)
def test_the_average_is_the_weighted_mean_of_its_steps_alone(rule, weights):
    """Where training began is in none of them: the first value, 100, would show."""
    mean, last = averaged(rule)
    assert np.allclose(mean, weights @ PATH / weights.sum(), atol=1e-5)
    assert torch.equal(last, torch.from_numpy(PATH[-1]))
    for step in (1, 6, 9):
        assert torch.equal(averaged(rule, stopped_at=step)[0], mean)


def test_parameters_come_back_after_an_error():
    parameters = {"w": torch.nn.Parameter(torch.ones(2))}
    average = Average("tail:1", parameters, 1)
    average.update(1)
    with torch.no_grad():
        parameters["w"].fill_(5)

    def fail():
        with average.in_place():
            assert parameters["w"].tolist() == [1, 1]
            raise KeyError

    pytest.raises(KeyError, fail)
    assert parameters["w"].tolist() == [5, 5]
