"""Is a recipe worth its noise? A verdict from public numbers alone, before anything is trained."""

import math
from collections.abc import Callable
from functools import cache

from utils.privacy.banded import deviations
from utils.privacy.plan import PrivacyPlan

# Norm of an example's gradient with its loss over its own tokens: 0.9 to 3.0 for the 10th to 90th
# percentile of short prompts and a model of 135 million weights.
TYPICAL_NORM = 1.5
# Tokens of a text that a recipe should be able to learn from.
SHORT_TEXT = 100
# What is less than these is warned of. 20 steps with a ratio of 1 in all were seen to learn, and so
# were 5 steps with one of 3.
LEAST_SHARE, LEAST_RATIO, LEAST_STEPS = 0.5, 0.5, 5
# Where steps and signal make half of what they could, see `promise`. In 22 steps of 256 rows the
# gain was 0.52 nats, in 11 of 512 it was 0.41 (SmolLM2-135M, 5,824 rows, epsilon 5.94).
HALF_STEPS, HALF_SIGNAL = 16, 2.0
# The highest learning rates to start from where noise is white, at a clip norm of 1, and what all
# steps of AdamW move a weight by at most; and by how much correlated noise was seen to raise them,
# see `learning_rate`.
MOST_RATES = {"adamw": 1e-2, "adamw_corrected": 3e-3, "sgd": 0.5}
MOST_MOVED = 0.64
MOST_RAISED = {"adamw": 2.3, "sgd": 2.0}
# What white noise may move a weight by in a step of SGD: 1.2e-3 was good, and with 2.4e-3 a base
# of 135 million weights fell apart. AdamW divides by its noise.
MOST_SHAKEN = 1.2e-3
# Rates outside these multiples of that are warned of. With 0.4 of it SmolLM2-135M gained 0.50 nats
# for 0.67 in 22 steps; three times it fell apart on a smaller model at this rank, and did not at
# lower ones.
LEAST_OF_RATE, MOST_OF_RATE, TRIED_RANK = 1 / 4, 3, 8
# Warm-up is 3 of 60 steps in the study, and never longer than what is usual.
STEPS_OF_WARMUP, MOST_WARMUP = 20, 30
# Lines of a plan, each of which costs the accountant half a second; steps that are begun with in
# the search for the best; the most, since rates are of runs of 11 to 439; and the smallest batch,
# since those of 64 and more were tried.
MOST_CHOICES, FIRST_STEPS, MOST_STEPS, LEAST_SIZE = 5, 256, 512, 32


def clip_share(plan: PrivacyPlan, max_seq_len: int) -> float:
    """The share of the clip norm that the gradient of a short text reaches, about."""
    norm = TYPICAL_NORM
    if plan.loss_normalization == "max_seq_len":
        norm *= min(1.0, SHORT_TEXT / max_seq_len)
    return 1.0 if plan.clip_function == "automatic" else min(1.0, norm / plan.clip_norm)


def signal_to_noise(plan: PrivacyPlan, trained: int, max_seq_len: int) -> tuple[float, float]:
    """The norm of the sum of a step's gradients, were all of them to agree, over its noise's.

    With B gradients of a share s of the clip norm C it is s C B over sigma C sqrt(d). Over T steps
    signals add up and white noise adds in squares, correlated noise to less.

    Args:
        trained: d, the numbers in the adapter.

    Returns:
        Of one step, and of all of them.
    """
    signal = clip_share(plan, max_seq_len) * plan.expected_batch_size
    noise = plan.noise_multiplier * math.sqrt(trained)
    of_a_step, of_all = (1.0, math.sqrt(plan.steps))
    if plan.bands > 1:
        of_a_step, of_all = deviations(plan.coefficients, plan.steps)
    return signal / (noise * of_a_step), plan.steps * signal / (noise * of_all)


def recipe_warnings(plan: PrivacyPlan, trained: int | None, max_seq_len: int) -> list[str]:
    """What is wrong with a recipe, and the flags to change, one line each.

    Args:
        trained: see `signal_to_noise`; None where it is not known.
    """
    warnings = []
    share = clip_share(plan, max_seq_len)
    if share < LEAST_SHARE and plan.loss_normalization == "max_seq_len":
        warnings.append(
            f"--loss_normalization max_seq_len divides a loss by {max_seq_len}, so that the "
            f"gradient of a text of {SHORT_TEXT} tokens has about {share:.0%} of the clip norm "
            f"that the noise is made for; use --loss_normalization tokens, or --clip_function "
            "automatic"
        )
    elif share < LEAST_SHARE:
        warnings.append(
            f"--clip {plan.clip_norm:g} is above the norm of most gradients, which is about "
            f"{TYPICAL_NORM:g}: noise grows with it and signal does not; use --clip 1"
        )
    ratio = signal_to_noise(plan, trained, max_seq_len)[1] if trained else LEAST_RATIO
    if ratio < LEAST_RATIO:
        warnings.append(
            f"noise drowns this recipe: if all gradients agreed, their sum over all steps would be "
            f"{ratio:.2g} times the noise; raise --total_bs, --num_epochs or --eps, or lower "
            "--lora_r"
        )
    if plan.steps < LEAST_STEPS:
        warnings.append(
            f"too few logical steps to learn from, {plan.steps}: AdamW moves a weight by about "
            "--lr in each; raise --num_epochs, or lower --total_bs"
        )
    return warnings


def promise(plan: PrivacyPlan, trained: int, max_seq_len: int) -> float:
    """About which share of the gain without noise and without end a recipe reaches, 0 to 1.

    AdamW moves a weight by about the learning rate in a step, however long the gradient, so few
    steps lead nowhere though each be exact: T / (T + 16). And noise leaves r / (r + 2) of it, for r
    of `signal_to_noise` in all. It puts recipes in order, and forecasts no loss.

    Args:
        trained: see `signal_to_noise`.
    """
    ratio = signal_to_noise(plan, trained, max_seq_len)[1]
    return plan.steps / (plan.steps + HALF_STEPS) * ratio / (ratio + HALF_SIGNAL)


def learning_rate(plan: PrivacyPlan, optimizer: str, raised: float = 1.0) -> float:
    """A rate to start from, of two digits, on a cosine.

    Of AdamW 1e-2 was the best in 60 steps of 7 million weights, where 3e-2 fell apart, and 1.5e-2
    in 22 of SmolLM2-135M, with 1e-2 next to it; 1e-3 is what was published for 439. Without the
    noise in its second moment 3e-3 was better. Steps of SGD with momentum are as long as clipped
    gradients and their noise: at a clip norm of 0.5 and epsilon 5.94 a rate of 1 was good in both,
    and 2 fell apart in one of them.
    Correlated noise, which cancels later, bears a higher rate: with AdamW, which divides by a
    step's noise, as much higher as that noise is, up to the 2.3 times that were tried; with SGD
    twice as high.

    Args:
        optimizer: as --optimizer.
        raised: a step's noise over that of white noise with the same guarantee.

    Returns:
        The rate, above 0.
    """
    rate = MOST_RATES[optimizer]
    if optimizer == "sgd":
        of_a_step = deviations(plan.coefficients, plan.steps)[0] if plan.bands > 1 else 1.0
        white = plan.noise_multiplier * of_a_step / raised
        rate = min(rate, MOST_SHAKEN * plan.expected_batch_size / white) / plan.clip_norm
    else:
        rate = min(rate, MOST_MOVED / plan.steps)
    return float(f"{rate * min(raised, MOST_RAISED.get(optimizer, 1.0)):.1e}")


def warmup_steps(steps: int) -> int:
    """Steps of warm-up to start from: a twentieth of them, and none of fewer than 10."""
    return min(MOST_WARMUP, (steps + STEPS_OF_WARMUP // 2) // STEPS_OF_WARMUP)


def schedule_warnings(
    lr_scheduler: str, warmup: int, steps: int, lr: float, advised: float | None, rank: int
) -> list[str]:
    """What is wrong with a schedule of the learning rate, and the flags to change, a line each.

    Args:
        lr_scheduler: as --lr_scheduler; warmup: its steps of warm-up.
        lr: its peak.
        advised: see `learning_rate`; None without privacy.
        rank: as --lora_r.
    """
    warnings = []
    fitting = f"--warmup_steps {warmup_steps(steps)}"
    if lr_scheduler != "constant" and 2 * warmup > steps:
        reached = "never" if warmup >= steps else f"in step {warmup + 1}"
        warnings.append(
            f"--warmup_steps {warmup} of {steps:,} steps: --lr is reached {reached}; use {fitting}"
        )
    if not advised:
        return warnings
    times, seen = lr / advised, ""
    if times <= LEAST_OF_RATE:
        seen = "learns little"
    elif times >= MOST_OF_RATE and rank >= TRIED_RANK:
        seen = "fell apart where it was tried"
    if seen:
        warnings.append(
            f"--lr {lr:g} is {times:.2g} times what to start from in {steps:,} steps, and {seen}; "
            f"use --lr {advised:g} --lr_scheduler cosine {fitting}"
        )
    return warnings


def batch_sizes(num_examples: int, num_draws: int) -> list[int]:
    """Expected batch sizes to choose from: powers of two, the smallest first.

    Args:
        num_examples: N, the largest that there can be.
        num_draws: examples of all steps together; a size leaves `HALF_STEPS` of them, since what
            leaves fewer promises less than half, and no more than `MOST_STEPS`.

    Returns:
        The sizes, of `LEAST_SIZE` or more where there are such; one at least.
    """
    most = max(1, min(num_examples, num_draws // HALF_STEPS))
    sizes = [1 << power for power in range(most.bit_length())]
    fit = [size for size in sizes if size >= LEAST_SIZE and num_draws // size <= MOST_STEPS]
    return fit or sizes[-1:]


def best_places(value: Callable[[int], float], num_places: int, first: int) -> range:
    """The places around the largest value, which rises up to it and falls beyond it.

    Args:
        value: of a place, from 0; slow, so it is asked for no more places than there must be.
        first: where to begin.

    Returns:
        `MOST_CHOICES` places, or all there are; the best is first or last of them only where there
        is no further one.
    """
    value = cache(value)
    best = min(first, num_places - 1)
    while near := [
        place
        for place in (best - 1, best + 1)
        if 0 <= place < num_places and value(place) > value(best)
    ]:
        best = max(near, key=value)
    # Of larger batches more than of smaller ones, for which an accountant takes longer.
    start = max(0, min(best - 1, num_places - MOST_CHOICES))
    return range(start, min(num_places, start + MOST_CHOICES))
