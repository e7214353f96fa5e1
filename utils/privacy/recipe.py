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
# What is less than these is warned of: of the clip norm, of what noise leaves of a recipe, and of
# steps. SmolLM2-135M gained a third of what it can learn where noise leaves a fifth by `promise`,
# and 5 steps were seen to learn.
LEAST_SHARE, LEAST_LEFT, LEAST_STEPS = 0.5, 0.1, 5
# Where steps and signal make half of what they could, see `promise`. An epoch of 15,392 rows at
# epsilon 5.94 gained 0.157, 0.180, 0.188 and 0.180 nats in 240, 120, 60 and 30 steps of 7 million
# weights, each at its own rate; in 60 it gained 0.130 at epsilon 1, 0.166 at 2.86 and 0.341 without
# privacy.
HALF_STEPS, HALF_SIGNAL = 12, 3000.0
# Learning rates of AdamW to start from in TRIED_STEPS of white noise on a base of up to TRIED_WIDTH
# features, and the highest ones that were tried and good, of white and of correlated noise (there
# with AdamW for TRIED_WIDTH), see `learning_rate`.
RATES, TRIED_STEPS = {"adamw": 1e-2, "adamw_corrected": 3e-3}, 60
TRIED_WIDTH, WIDTH_POWER = 576, 2 / 3
HIGHEST_RATES = {"adamw": (1.5e-2, 2e-2), "adamw_corrected": (3e-3,), "sgd": (0.5, 1.0)}
# What the noise of all steps may move a weight by with SGD, in deviations: with 8.3e-3 it learnt,
# and with 1.1e-2 a base of 135 million weights fell apart. AdamW divides by its noise.
MOST_SHAKEN = 8.3e-3
# Rates outside these multiples of that are warned of. With 0.4 of it SmolLM2-135M gained 0.50 nats
# for 0.67 in 22 steps; with twice it fell apart by SGD and by correlated noise, and with three
# times a smaller model did at rank 8. With white noise ranks up to this one were good at twice.
LEAST_OF_RATE, MOST_OF_RATE, LOW_RANK = 1 / 4, 2, 4
# Warm-up is 3 of 60 steps in the study, and never longer than what is usual.
STEPS_OF_WARMUP, MOST_WARMUP = 20, 30
# Lines of a plan, each of which costs the accountant half a second; steps that are begun with in
# the search for the best; the most, since rates are of runs of 11 to 481; and the smallest batch,
# since smaller ones were tried on one base alone.
MOST_CHOICES, FIRST_STEPS, MOST_STEPS, LEAST_SIZE = 5, 128, 512, 64


def clip_share(plan: PrivacyPlan, max_seq_len: int) -> float:
    """The share of the clip norm that the gradient of a short text reaches, about; up to 1.

    Args:
        max_seq_len: tokens, which a loss is divided by if it is not by those of its text.
    """
    norm = TYPICAL_NORM
    if plan.loss_normalization == "max_seq_len":
        norm *= min(1.0, SHORT_TEXT / max_seq_len)
    return 1.0 if plan.clip_function == "automatic" else min(1.0, norm / plan.clip_norm)


def noise_of(plan: PrivacyPlan) -> tuple[float, float]:
    """The deviation of a number's noise in one step, and in the sum of all, each over sigma C."""
    if plan.bands > 1:
        return deviations(plan.coefficients, plan.steps)
    return 1.0, math.sqrt(plan.steps)


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
    of_a_step, of_all = noise_of(plan)
    return signal / (noise * of_a_step), plan.steps * signal / (noise * of_all)


def recipe_warnings(plan: PrivacyPlan, max_seq_len: int) -> list[str]:
    """What is wrong with a recipe, and the flags to change, one line each.

    Args:
        max_seq_len: see `clip_share`.
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
            f"{TYPICAL_NORM:g}: noise grows with it and signal does not; use --clip 0.5"
        )
    if (left := noise_leaves(plan, max_seq_len)) < LEAST_LEFT:
        warnings.append(
            f"noise drowns this recipe and leaves about {left:.1%} of what could be learnt; raise "
            "--total_bs, --num_epochs or --eps"
        )
    if plan.steps < LEAST_STEPS:
        warnings.append(
            f"too few logical steps to learn from, {plan.steps}: however exact a gradient, one "
            "step does not get far; raise --num_epochs, or lower --total_bs"
        )
    return warnings


def noise_leaves(plan: PrivacyPlan, max_seq_len: int) -> float:
    """About which share of what could be learnt noise leaves of a recipe, 0 to 1.

    It is q / (q + 3000), for q the signal over the noise of one number in all steps: how many
    numbers an adapter has does not count, since ranks of 1 to 8 learnt the same, and all linear
    layers no less than attention.

    Args:
        max_seq_len: see `clip_share`.
    """
    _, ratio = signal_to_noise(plan, 1, max_seq_len)
    return ratio / (ratio + HALF_SIGNAL)


def promise(plan: PrivacyPlan, max_seq_len: int) -> float:
    """About which share of the gain without noise and without end a recipe reaches, 0 to 1.

    AdamW moves a weight by about the learning rate in a step, however long the gradient, so few
    steps lead nowhere though each be exact: T / (T + 12) of what `noise_leaves`. It puts recipes in
    order, and forecasts no loss.

    Args:
        max_seq_len: see `clip_share`.
    """
    return plan.steps / (plan.steps + HALF_STEPS) * noise_leaves(plan, max_seq_len)


def learning_rate(plan: PrivacyPlan, optimizer: str, width: int = TRIED_WIDTH) -> float:
    """A rate to start from, of two digits, on a cosine.

    AdamW divides by the noise of a step, so noise moves a weight by the rate times what the noise
    of all steps is to that of one: the root of the steps if it is white. In an epoch of 7 million
    weights 5e-3 was the best of 2.7e-3, 5e-3 and 1e-2 in 240 steps, 7e-3 of 7e-3 and 1e-2 in 120,
    1e-2 of 6e-3, 1e-2 and 1.5e-2 in 60, where 3e-2 fell apart, 2e-2 of 1e-2 and 2e-2 in 30; and of
    SmolLM2-135M 1.5e-2 of 4e-3 to 1.5e-2 in 22. Without the noise in its second moment 3e-3 was
    better in 60. These are of bases of up to 576 features. For 4,096 and 439 steps 1e-3 was
    published, so wider ones begin lower, by that power of their width which comes to it.
    Correlated noise cancels later and bears more, as long as single steps are not too long: with
    256 features 4e-2 was the best of 6e-3 to 4e-2 in 240, and 3.5e-2 and 5e-2 were alike in 60;
    with 576 2e-2 was good in 45, and 4e-2 learnt next to nothing.

    Steps of SGD with momentum are as long as clipped gradients and their noise: at a clip norm of
    0.5 a rate of 1 was good at epsilon 5.94, 2 with correlated noise, and 1.2 with it at epsilon 1.

    Args:
        optimizer: as --optimizer.
        width: features of a token between the layers of the base.

    Returns:
        The rate, above 0.
    """
    of_a_step, of_all = noise_of(plan)
    highest = HIGHEST_RATES[optimizer][plan.bands > 1]
    if optimizer == "sgd":
        shaken = plan.noise_multiplier * of_all / plan.expected_batch_size
        rate = min(highest, MOST_SHAKEN / shaken) / plan.clip_norm
    else:
        rate = RATES[optimizer] * math.sqrt(TRIED_STEPS) * of_a_step / of_all
        if plan.bands > 1:
            highest *= TRIED_WIDTH / width
        rate = min(highest, rate * min(1.0, TRIED_WIDTH / width) ** WIDTH_POWER)
    return float(f"{rate:.1e}")


def warmup_steps(steps: int) -> int:
    """Steps of warm-up to start from: a twentieth of them, and none of fewer than 10."""
    return min(MOST_WARMUP, (steps + STEPS_OF_WARMUP // 2) // STEPS_OF_WARMUP)


def schedule_warnings(
    lr_scheduler: str, warmup: int, steps: int, lr: float, advised: float | None, bears_more: bool
) -> list[str]:
    """What is wrong with a schedule of the learning rate, and the flags to change, a line each.

    Args:
        lr_scheduler: as --lr_scheduler; warmup: its steps of warm-up.
        lr: its peak.
        advised: see `learning_rate`; None without privacy.
        bears_more: the noise is white, and no rank above `LOW_RANK`.
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
    elif times >= MOST_OF_RATE and not bears_more:
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
