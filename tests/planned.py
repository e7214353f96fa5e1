"""Has the accountant's answers about the runs of `tests.training.flags`: processes inherit them."""

from utils.privacy.accounting import (
    SampledGaussian,
    calibrate_noise_multiplier,
    epsilon_bounds,
    group_epsilons,
)

EPSILON, DELTA, RATE, STEPS = 8.0, 1e-3, 1 / 8, 8
RUN = [SampledGaussian(RATE, calibrate_noise_multiplier(EPSILON, DELTA, RATE, STEPS), STEPS)]
epsilon_bounds(RUN, DELTA)
group_epsilons(RUN, DELTA)
