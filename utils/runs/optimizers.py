"""AdamW that knows the noise of the gradients that it is given, and schedules of the rate."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

# Of the noise's variance; what is left of a second moment is taken to be no smaller.
FLOOR = 0.1


class CorrectedAdamW(torch.optim.Optimizer):
    """AdamW without the noise's part of its second moment.

    Where noise outweighs the gradient, v_t is about the noise's variance Phi for every weight, and
    AdamW is SGD with momentum. Here a weight moves by lr m̂ / sqrt(max(v̂ - Phi, FLOOR · Phi))
    (Tang, Shpilevskiy and Lecuyer, 2023, "DP-AdamBC", with a floor in proportion to Phi). Phi is
    public, so this is post-processing.

    Args:
        noise_deviation: sqrt(Phi) of white noise, above 0.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        noise_deviation: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas})
        self._variance = noise_deviation**2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every tensor that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(tensor)
                    state["exp_avg_sq"] = torch.zeros_like(tensor)
                state["step"] += 1
                taken = float(state["step"])
                state["exp_avg"].lerp_(tensor.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(tensor.grad.square(), 1 - beta2)
                first = state["exp_avg"] / (1 - beta1**taken)
                second = state["exp_avg_sq"] / (1 - beta2**taken) - self._variance
                tensor.mul_(1 - lr * group["weight_decay"])
                tensor.sub_(lr * first / second.clamp(min=FLOOR * self._variance).sqrt())


def schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int
) -> LambdaLR:
    """The schedule of that name, of which every step has a rate above 0.

    The libraries' own begins its warm-up at a rate of 0: the first step would be paid for and move
    nothing. Here step t of w has (t + 1) / (w + 1) of the peak, and from step w on all is theirs.

    Args:
        name: as `transformers.get_scheduler` has it.
    """
    (of_step,) = get_scheduler(name, optimizer, warmup_steps + 1, steps + 1).lr_lambdas
    return LambdaLR(optimizer, lambda step: of_step(step + 1))
