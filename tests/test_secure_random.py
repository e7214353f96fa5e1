"""Random draws: exact where they can be checked exactly, and statistics with power elsewhere.

Every statistical check is a function from draws to a p-value. The real generator must pass it and
named wrong generators must fail it, so that no check is too blunt to see what it is for.
"""

import copy
import math
import os
import pickle
import subprocess
import sys
import time
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from scipy import special, stats

from tests.paths import ROOT
from utils import secure_random
from utils.secure_random import SecureRandom, grid_spacing, round_to_grid

# Nominal; a hundred times below the one false alarm in a million that a run may cost, which leaves
# room for the asymptotic distributions of the statistics this far out.
FALSE_ALARM = 1e-8
GAUSSIANS = 10_000_000
MAX_WORD = 2**64 - 1


class ScriptedRandom(SecureRandom):
    """Takes its words from a list instead of the key stream."""

    __slots__ = ("_script",)

    def __init__(self, words):
        super().__init__()
        self._script = list(words)

    def uint64(self, count):
        drawn, self._script = self._script[:count], self._script[count:]
        assert len(drawn) == count, "more words were drawn than scripted"
        return np.array(drawn, dtype="<u8")

    def exhausted(self):
        return not self._script


# --- the key stream ------------------------------------------------------------------------------


def keys_from(monkeypatch, *keys):
    """Let the operating system's entropy be these keys, in turn."""
    remaining = list(keys)
    monkeypatch.setattr(os, "urandom", lambda length: remaining.pop(0))


@pytest.mark.parametrize(
    ("key", "first_block", "blocks"),
    [
        (  # RFC 8439, appendix A.1, test vectors 1 and 2: blocks 0 and 1
            bytes(32),
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (  # test vector 3: block 1
            bytes(31) + b"\x01",
            1,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
            "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
        ),
        (  # test vector 4: block 2
            b"\x00\xff" + bytes(30),
            2,
            "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
            "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
        ),
    ],
    ids=["vectors-1-2", "vector-3", "vector-4"],
)
def test_words_are_the_chacha20_key_stream(monkeypatch, key, first_block, blocks):
    keys_from(monkeypatch, key)
    stream = SecureRandom()
    stream.uint64(8 * first_block)
    expected = bytes.fromhex(blocks)
    words = stream.uint64(len(expected) // 8)
    assert [int(word) for word in words] == [
        int.from_bytes(expected[i : i + 8], "little") for i in range(0, len(expected), 8)
    ]


def test_the_stream_does_not_depend_on_how_it_is_cut():
    long = 2 * secure_random._CHUNK_WORDS + 5
    whole = SecureRandom.insecure_fixed(0, "noise").uint64(long)
    parts = SecureRandom.insecure_fixed(0, "noise")
    cut = np.concatenate([parts.uint64(count) for count in (3, 0, 1, long - 4)])
    assert np.array_equal(whole, cut)


def test_two_objects_share_nothing():
    first, second = SecureRandom(), SecureRandom()
    words = np.concatenate([first.uint64(1000), second.uint64(1000)])
    assert len(np.unique(words)) == 2000


def words_drawn_in_a_child(stream, count, depth=1):
    """Fork `depth` times in a row, draw in the last child, and hand the words to the parent."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            words = (
                stream.uint64(count)
                if depth == 1
                else words_drawn_in_a_child(stream, count, depth - 1)
            )
            os.write(writer, words.tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        received = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(received, dtype="<u8")


def test_forked_processes_share_nothing():
    stream = SecureRandom()
    stream.uint64(10)
    draws = [
        words_drawn_in_a_child(stream, 100),
        words_drawn_in_a_child(stream, 100),
        words_drawn_in_a_child(stream, 100, depth=2),
        stream.uint64(100),
    ]
    assert len(np.unique(np.concatenate(draws))) == 400


def test_a_forked_parent_keeps_its_stream():
    stream, undisturbed = (SecureRandom.insecure_fixed(0, "noise") for _ in range(2))
    stream.uint64(10)
    words_drawn_in_a_child(stream, 10)
    assert np.array_equal(stream.uint64(10), undisturbed.uint64(20)[10:])


def test_a_new_key_comes_before_the_counter_can_wrap(monkeypatch):
    assert secure_random._BYTES_PER_KEY < 64 * 2**32
    keys = [bytes([i]) * 32 for i in (1, 2, 3)]
    monkeypatch.setattr(secure_random, "_BYTES_PER_KEY", 1024)
    keys_from(monkeypatch, *keys, *keys)
    stream = SecureRandom()
    drawn = [stream.uint64(100) for _ in range(3)]
    # A key gives 128 words; the second hundred would pass that, so it starts on a new key.
    starts = [SecureRandom().uint64(100) for _ in keys]
    assert np.array_equal(drawn, starts)


def test_the_key_cannot_be_seen(monkeypatch):
    key = bytes(range(80, 112))
    keys_from(monkeypatch, key)
    stream = SecureRandom()
    parts = [getattr(stream, name) for name in stream.__slots__]
    assert key not in parts
    shown = " ".join(map(repr, [stream, *parts]))
    assert not hasattr(stream, "__dict__")
    for spelling in (key.decode(), key.hex(), repr(list(key))[1:-1]):
        assert spelling not in shown


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize(
    "make", [SecureRandom, lambda: SecureRandom.insecure_fixed(0, "noise")], ids=["secure", "fixed"]
)
def test_a_stream_refuses_to_be_copied(duplicate, make):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        duplicate(make())


def test_insecure_fixed_repeats_and_separates_by_seed_stream_and_step():
    names = [(0, "noise", 0), (1, "noise", 0), (0, "sampling", 0), (0, "noise", 1)]
    names += [(0, "1", 11), (0, "11", 1), (0, "1/1", 1), (0, "", 111)]
    draws = [SecureRandom.insecure_fixed(*name).uint64(100) for name in names]
    again = [SecureRandom.insecure_fixed(*name).uint64(100) for name in names]
    assert np.array_equal(draws, again)
    assert len(np.unique(draws)) == 100 * len(names)
    assert np.array_equal(SecureRandom.insecure_fixed(0, "noise").uint64(100), draws[0])


def test_only_fixed_streams_are_marked_insecure():
    assert SecureRandom.insecure_fixed(0, "noise").insecure is True
    assert SecureRandom().insecure is False


# --- Bernoulli -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probability",
    [
        Fraction(4096, 180_000),
        Fraction(1, 3),
        Fraction(1, 2),
        Fraction(1, 2**64),
        Fraction(1, 2**70),
        Fraction(MAX_WORD, 2**64),
        Fraction(2**200 - 1, 2**200),
    ],
)
def test_bernoulli_compares_a_uniform_real_with_the_exact_fraction(probability):
    first, rest = divmod(probability * 2**64, 1)
    second = math.floor(rest * 2**64)

    def around(word):
        return [w for w in (word - 1, word, word + 1) if 0 <= w <= MAX_WORD]

    for leading in around(first):
        for following in around(second):
            uniform = Fraction(leading * 2**64 + following, 2**128)
            if uniform <= probability < uniform + Fraction(1, 2**128):
                continue  # 128 bits do not decide; the next test goes deeper
            words = [leading] if leading != first else [leading, following]
            scripted = ScriptedRandom(words)
            kept = scripted.bernoulli_indices(*probability.as_integer_ratio(), 1)
            assert (len(kept) == 1) == (uniform < probability)
            assert scripted.exhausted()


def test_bernoulli_draws_on_until_a_tie_is_broken():
    third = MAX_WORD // 3  # every 64-bit digit of 1/3
    words = [third, third - 1, third, third, third + 1]  # indices 0, 2 and 3 are tied
    words += [third, third - 1, third]  # 0 and 3 are tied again, 2 is kept
    words += [third + 1, third]  # 0 is out, 3 is tied once more
    words += [0]
    scripted = ScriptedRandom(words)
    assert scripted.bernoulli_indices(1, 3, 5).tolist() == [1, 2, 3]
    assert scripted.exhausted()


def test_bernoulli_at_probability_zero_and_one():
    assert ScriptedRandom([0, 0, 0, 5, 5, 5]).bernoulli_indices(0, 7, 3).tolist() == []
    assert ScriptedRandom([]).bernoulli_indices(7, 7, 3).tolist() == [0, 1, 2]
    stream = SecureRandom()
    assert len(stream.bernoulli_indices(0, 1, 200_000)) == 0
    assert np.array_equal(stream.bernoulli_indices(1, 1, 200_000), np.arange(200_000))


def test_bernoulli_shapes_and_types():
    stream = SecureRandom()
    for numerator in (0, 1, 2):
        assert stream.bernoulli_indices(numerator, 2, 0).shape == (0,)
        assert stream.bernoulli_indices(numerator, 2, 50).dtype == np.int64
    kept = stream.bernoulli_indices(1, 2, 3 * secure_random._CHUNK_WORDS + 7)
    assert np.all(np.diff(kept) > 0)
    # 80 draws in the last chunk's tail: none of them kept has probability 2^-80.
    assert kept[-1] >= 3 * secure_random._CHUNK_WORDS + 7 - 80


@pytest.mark.parametrize(("numerator", "denominator"), [(3, 2), (-1, 2), (0, 0), (1, -2)])
def test_bernoulli_refuses_what_is_no_probability(numerator, denominator):
    with pytest.raises(ValueError, match=f"found {numerator} / {denominator}"):
        SecureRandom().bernoulli_indices(numerator, denominator, 10)


@pytest.mark.parametrize("fraction", [(0.5, 1), (1, 2.0), (2.0, 2)])
def test_bernoulli_refuses_floats(fraction):
    with pytest.raises(TypeError):
        SecureRandom().bernoulli_indices(*fraction, 10)


def test_bernoulli_takes_numpy_integers_without_overflow():
    scripted = ScriptedRandom([2**62 - 1, 2**62 + 1])
    assert scripted.bernoulli_indices(np.int64(1), np.int32(4), 2).tolist() == [0]


EXAMPLES, STEPS, BATCH = 500, 4000, 23


def poisson_sampler():
    stream = SecureRandom()
    kept = np.zeros((STEPS, EXAMPLES), dtype=bool)
    for step in kept:
        step[stream.bernoulli_indices(BATCH, EXAMPLES, EXAMPLES)] = True
    return kept


def fixed_size_sampler():
    order = np.random.default_rng(0).permuted(np.tile(np.arange(EXAMPLES), (STEPS, 1)), axis=1)
    return order < BATCH


def epoch_shuffler():
    rng = np.random.default_rng(0)
    epochs = -(-STEPS * BATCH // EXAMPLES)
    order = np.concatenate([rng.permutation(EXAMPLES) for _ in range(epochs)])
    kept = np.zeros((STEPS, EXAMPLES), dtype=bool)
    np.put_along_axis(kept, order[: STEPS * BATCH].reshape(STEPS, BATCH), True, axis=1)
    return kept


def five_percent_too_many():
    return np.random.default_rng(0).random((STEPS, EXAMPLES)) < 1.05 * BATCH / EXAMPLES


def sticky(shape):
    """Each row repeats one in ten of the decisions in the row before."""
    rng = np.random.default_rng(0)
    kept, repeat = rng.random(shape) < BATCH / EXAMPLES, rng.random(shape) < 0.1
    for row in range(1, len(kept)):
        kept[row, repeat[row]] = kept[row - 1, repeat[row]]
    return kept


def sticky_steps():
    return sticky((STEPS, EXAMPLES))


def sticky_examples():
    return sticky((EXAMPLES, STEPS)).T


def binomial_fit(counts, trials):
    """P-value of Pearson's chi-square of `counts` against Binomial(trials, q), by its quantiles."""
    binomial = stats.binom(trials, BATCH / EXAMPLES)
    edges = np.unique(binomial.ppf(np.linspace(0.05, 0.95, 19)))
    probabilities = np.diff(binomial.cdf(edges), prepend=0, append=1)
    observed = np.bincount(np.searchsorted(edges, counts), minlength=len(probabilities))
    return stats.chisquare(observed, len(counts) * probabilities).pvalue


def batch_sizes(kept):
    return binomial_fit(kept.sum(1), EXAMPLES)


def participations(kept):
    return binomial_fit(kept.sum(0), STEPS)


def adjacent_steps(kept):
    """P-value of the number of examples in both of two adjacent steps, against q^2."""
    both = kept[0::2] & kept[1::2]
    return stats.binomtest(int(both.sum()), both.size, (BATCH / EXAMPLES) ** 2).pvalue


def adjacent_examples(kept):
    return adjacent_steps(kept.T)


SAMPLER_CHECKS = [batch_sizes, participations, adjacent_steps, adjacent_examples]


@pytest.mark.parametrize("check", SAMPLER_CHECKS)
def test_poisson_sampling_has_the_right_distribution(check):
    assert check(poisson_sampler()) > FALSE_ALARM


@pytest.mark.parametrize(
    ("check", "wrong_sampler"),
    [
        (batch_sizes, fixed_size_sampler),
        (batch_sizes, epoch_shuffler),
        (batch_sizes, five_percent_too_many),
        (participations, epoch_shuffler),
        (participations, five_percent_too_many),
        (adjacent_steps, epoch_shuffler),
        (adjacent_steps, sticky_steps),
        (adjacent_examples, sticky_examples),
    ],
)
def test_the_check_rejects_a_wrong_sampler(check, wrong_sampler):
    assert check(wrong_sampler()) < FALSE_ALARM


# --- Gaussian ------------------------------------------------------------------------------------


def one_gaussian(*words):
    scripted = ScriptedRandom(words)
    value = scripted.gaussian(1).item()
    assert scripted.exhausted()
    return value


@pytest.mark.parametrize("magnitude", [2**53, 2**53 + 1, 2**60 + 12345, 2**62, 2**63 - 1])
def test_gaussian_inverts_the_distribution(magnitude):
    """The left tail Phi(z), recomputed from z, is the uniform that the word spells."""
    z = one_gaussian(magnitude + 2**63)
    assert special.log_ndtr(z) == pytest.approx(math.log(magnitude / 2**64), rel=1e-13)
    assert one_gaussian(magnitude) == -z


@pytest.mark.parametrize("magnitude", [0, 1, 2**20 + 7, 2**53 - 1])
@pytest.mark.parametrize("finer", [0, 1, 2**63, MAX_WORD])
def test_far_tails_take_their_resolution_from_a_second_word(magnitude, finer):
    z = one_gaussian(magnitude + 2**63, finer)
    uniform = Fraction(2 * (magnitude * 2**64 + finer) + 1, 2**129)
    assert special.log_ndtr(z) == pytest.approx(
        math.log(uniform.numerator) - math.log(uniform.denominator), rel=1e-13
    )
    assert one_gaussian(magnitude, finer) == -z


def test_no_word_gives_an_infinite_or_missing_sample():
    extremes = [one_gaussian(0, 0), one_gaussian(2**63, 0)]
    extremes += [one_gaussian(2**63 - 1), one_gaussian(MAX_WORD)]
    assert extremes == pytest.approx([13.1, -13.1, 0, 0], abs=0.1)


def test_gaussian_samples_keep_their_place():
    """Samples that need a second word do not disturb the others, in any chunk."""
    chunk = np.full(secure_random._CHUNK_WORDS, 2**62)
    chunk[1::1024] = 5
    finer = [2**63] * len(chunk[1::1024])
    scripted = ScriptedRandom([*chunk.tolist(), *finer] * 2)
    samples = scripted.gaussian(2 * len(chunk))
    expected = torch.full_like(samples, one_gaussian(2**62))
    expected[1::1024] = one_gaussian(5, 2**63)
    assert torch.equal(samples, expected)


def test_gaussian_shape_and_type():
    stream = SecureRandom()
    for count in (0, 1, secure_random._CHUNK_WORDS + 1):
        samples = stream.gaussian(count)
        assert samples.shape == (count,)
        assert samples.dtype == torch.float64


@cache
def secure_gaussians():
    return SecureRandom().gaussian(GAUSSIANS).numpy()


@cache
def numpy_gaussians():
    return np.random.default_rng(0).standard_normal(GAUSSIANS)


def scale_099():
    return 0.99 * numpy_gaussians()


def shifted():
    return numpy_gaussians() + 0.003


@cache
def sum_of_12_uniforms():
    rng = np.random.default_rng(0)
    return sum(rng.random(GAUSSIANS) for _ in range(12)) - 6


def truncated_at_4_5():
    return np.clip(numpy_gaussians(), -4.5, 4.5)


def one_tail_truncated():
    return np.minimum(numpy_gaussians(), 4)


def float32_box_muller():
    rng = np.random.default_rng(0)
    u, v = rng.random((2, GAUSSIANS // 2), dtype=np.float32)
    radius, angle = np.sqrt(-2 * np.log1p(-u)), np.float32(2 * np.pi) * v
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float64)


def uniforms_of_24_bits():
    cells = np.random.default_rng(0).integers(2**24, size=GAUSSIANS)
    return special.ndtri((cells + 0.5) / 2**24)


def autoregressive():
    z = numpy_gaussians()
    return (z + 0.01 * np.roll(z, 1)) / math.hypot(1, 0.01)


def repeating_chunks():
    return np.resize(numpy_gaussians()[: secure_random._CHUNK_WORDS], GAUSSIANS)


def repeated_magnitudes():
    """Antithetic-like pairs: uncorrelated, but each magnitude serves twice under random signs."""
    z = numpy_gaussians()
    return np.copysign(np.repeat(z[: len(z) // 2], 2), np.roll(z, 5))


def normal_scores(*scores):
    """P-value of the largest of several standard normal scores, two-sided (Bonferroni)."""
    return 2 * len(scores) * stats.norm.sf(max(abs(score) for score in scores))


def moments(z):
    """Means of the first four Hermite polynomials: mean 0 and variance k!, uncorrelated."""
    root = math.sqrt(len(z))
    square = z * z
    cubic, quartic = z * (square - 3), square * (square - 6) + 3
    return normal_scores(
        root * z.mean(),
        root * (square.mean() - 1) / math.sqrt(2),
        root * cubic.mean() / math.sqrt(6),
        root * quartic.mean() / math.sqrt(24),
    )


def kolmogorov_smirnov(z):
    ordered = np.sort(z[:4_000_000])
    cdf = special.ndtr(ordered)
    steps = np.arange(len(cdf) + 1) / len(cdf)
    distance = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
    return stats.kstwobign.sf(distance * math.sqrt(len(cdf)))


def lags(z):
    """Correlations of values and of squares at short lags and across chunks."""
    distances = (1, 2, 3, 8, secure_random._CHUNK_WORDS)
    square = (z * z - 1) / math.sqrt(2)
    return normal_scores(
        *(
            series[lag:] @ series[:-lag] / math.sqrt(len(series) - lag)
            for series in (z, square)
            for lag in distances
        )
    )


def tail_counts(z):
    """Counts beyond 3, 4, 4.5 and 5, on each side and on both, against the binomial law."""
    p_values = []
    for threshold in (3, 4, 4.5, 5):
        right, left = int((z > threshold).sum()), int((z < -threshold).sum())
        tail = stats.norm.sf(threshold)
        for count, probability in ((right, tail), (left, tail), (right + left, 2 * tail)):
            p_values.append(stats.binomtest(count, len(z), probability).pvalue)
    return len(p_values) * min(p_values)


def tail_resolution(z):
    """P-value of a repeated value beyond 3.5, where only float64's own spacing limits samples."""
    threshold, spacing = 3.5, 2.0**-51
    tail = z[np.abs(z) > threshold]
    if len(np.unique(tail)) == len(tail):
        return 1.0
    # Two samples collide with probability spacing * (integral of the squared conditional density).
    hazard = stats.norm.pdf(threshold) / stats.norm.sf(threshold)
    return len(tail) ** 2 / 2 * spacing * hazard**2 / (4 * threshold)


GAUSSIAN_CHECKS = [moments, kolmogorov_smirnov, lags, tail_counts, tail_resolution]


@pytest.mark.parametrize("check", GAUSSIAN_CHECKS)
def test_gaussian_has_the_right_distribution(check):
    assert check(secure_gaussians()) > FALSE_ALARM


@pytest.mark.parametrize(
    ("check", "wrong_generator"),
    [
        (moments, scale_099),
        (moments, shifted),
        (moments, sum_of_12_uniforms),
        (kolmogorov_smirnov, scale_099),
        (kolmogorov_smirnov, sum_of_12_uniforms),
        (lags, autoregressive),
        (lags, repeating_chunks),
        (lags, repeated_magnitudes),
        (tail_counts, scale_099),
        (tail_counts, sum_of_12_uniforms),
        (tail_counts, truncated_at_4_5),
        (tail_counts, one_tail_truncated),
        (tail_resolution, float32_box_muller),
        (tail_resolution, uniforms_of_24_bits),
    ],
)
def test_the_check_rejects_a_wrong_generator(check, wrong_generator):
    assert check(wrong_generator()) < FALSE_ALARM


def cross_correlation(first, second):
    return normal_scores(first @ second / math.sqrt(len(first)))


def test_successive_draws_and_separate_streams_are_uncorrelated():
    count = 1_000_000
    stream = SecureRandom()
    draws = [stream.gaussian(count), stream.gaussian(count), SecureRandom().gaussian(count)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert cross_correlation(draws[first], draws[second]) > FALSE_ALARM
    leaking = draws[1] + 0.01 * draws[0]
    assert cross_correlation(draws[0], leaking) < FALSE_ALARM


def test_ten_million_gaussians_take_less_than_two_seconds_of_one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stream = SecureRandom()
        start = time.process_time()
        stream.gaussian(10_000_000)
        assert time.process_time() - start < 2
    finally:
        torch.set_num_threads(threads)


def test_large_draws_need_little_memory_beyond_their_result():
    script = r"""
import re
from utils.secure_random import SecureRandom
def peak():  # MiB; getrusage would inherit the test process's own peak
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
stream = SecureRandom()
stream.gaussian(1000)
before = peak()
samples = stream.gaussian(20_000_000)
print(peak() - before - samples.nbytes / 2**20)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 32


# --- the grid ------------------------------------------------------------------------------------

STANDARD_DEVIATIONS = [1e-6, 0.405, 0.5, np.nextafter(0.5, 0), 1.0, 1.11, 10.0, 3e5]


@pytest.mark.parametrize("std", STANDARD_DEVIATIONS)
def test_grid_spacing_is_a_power_of_two_well_below_the_noise(std):
    spacing = grid_spacing(std)
    assert math.log2(spacing).is_integer()
    assert std / 2048 < spacing <= std / 1024


@pytest.mark.parametrize("std", [0, -1, math.inf, math.nan])
def test_grid_spacing_refuses_what_is_no_noise(std):
    with pytest.raises(ValueError, match=f"found {std}"):
        grid_spacing(std)


@pytest.mark.parametrize("std", STANDARD_DEVIATIONS)
def test_rounded_sums_are_the_nearest_grid_points_and_exact_in_float32(std):
    spacing = grid_spacing(std)
    sums = (torch.rand(100_000, dtype=torch.float64) - 0.5) * 2 * 8192 * std
    rounded = round_to_grid(sums, spacing)
    assert torch.equal(rounded / spacing, (rounded / spacing).round())
    assert (rounded - sums).abs().max() <= spacing / 2
    assert torch.equal(rounded.float().double(), rounded)
    assert torch.equal(round_to_grid(rounded, spacing), rounded)


def test_rounding_leaves_the_noise_distribution_alone():
    std = 0.405
    noise = std * torch.from_numpy(secure_gaussians()[:4_000_000])

    def rounded(spacing):
        return (round_to_grid(noise, spacing) / std).numpy()

    for check in (moments, kolmogorov_smirnov, tail_counts):
        assert check(rounded(grid_spacing(std))) > FALSE_ALARM
        assert check(rounded(0.25)) < FALSE_ALARM


def bits(values):
    return values.view(torch.int64)


def test_a_released_value_depends_on_its_grid_cell_alone():
    spacing = grid_spacing(1.0)
    points = torch.arange(-2000, 2001, dtype=torch.float64) * spacing
    within = (torch.rand(50, len(points), dtype=torch.float64) - 0.5) * 0.999 * spacing
    released = round_to_grid(points + within, spacing)
    assert torch.equal(bits(released), bits(points).expand_as(released))


def test_low_order_bits_do_not_betray_the_value_under_the_noise():
    """Mironov's attack in one line: under a large value the noise loses its low-order bits."""

    def share_with_empty_low_bits(released):
        return (released % 2.0**-41 == 0).double().mean().item()

    noise = SecureRandom().gaussian(10_000)
    spacing = grid_spacing(1.0)
    small, large = noise, noise + 4096
    assert share_with_empty_low_bits(small) < 0.01
    assert share_with_empty_low_bits(large) == 1
    assert share_with_empty_low_bits(round_to_grid(small, spacing)) == 1
    assert share_with_empty_low_bits(round_to_grid(large, spacing)) == 1


def test_rounding_refuses_another_dtype_or_spacing():
    with pytest.raises(ValueError, match=r"float64.*found torch.float32"):
        round_to_grid(torch.zeros(3), 0.5)
    for spacing in (0.0, 0.3, -0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"power of two; found {spacing}"):
            round_to_grid(torch.zeros(3, dtype=torch.float64), spacing)
