"""Cryptographic random draws for the sampling and the noise of a DP mechanism.

The guarantee assumes that an adversary cannot predict the sampled batches or the noise. A seeded
simulation generator does not give that; a ChaCha20 key stream (RFC 8439) under a key that nobody
knows does, for computationally bounded adversaries. The key comes from the operating system's
entropy, lives only inside the cipher, and is never stored, printed or copied.
"""

import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

# One chunk of words and its temporaries fit in a core's cache, and bound the memory of any draw.
_CHUNK_WORDS = 1 << 16
_ZEROS = memoryview(bytes(8 * _CHUNK_WORDS))

# A 32-bit block counter would repeat the key stream after 256 GiB. A new key long before that
# costs nothing, and a key that leaks late reveals nothing about the draws before it.
_BYTES_PER_KEY = 1 << 30

# Noise standard deviations per grid spacing, as a power of two; `grid_spacing` argues the choice.
_GRID_BITS = 10

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


# Counting forks is safer than comparing process ids, which the kernel reuses and which are often
# equal (1) on both sides of a new namespace.
os.register_at_fork(after_in_child=_count_fork)


class SecureRandom:
    """One stream of cryptographic random numbers (ChaCha20).

    Every object has its own key, drawn from `os.urandom` when it is made, again in the child
    after a fork, and again after each GiB of key stream. So no two objects, processes or resumed
    runs share a stream. Objects refuse to be pickled or copied: the copy would repeat the noise.
    A stream belongs to one thread.

    Attributes:
        insecure: True for a stream of `insecure_fixed`; a mechanism that used one has no
            guarantee and its report must say so.
    """

    __slots__ = ("insecure", "_new_key", "_encryptor", "_bytes_left", "_forks_seen")

    def __init__(self):
        self._start(lambda: os.urandom(32), insecure=False)

    @classmethod
    def insecure_fixed(cls, seed: int, stream: str, step: int = 0) -> "SecureRandom":
        """Make a reproducible stream, for tests only: whoever knows the seed knows the noise.

        Args:
            seed: any integer.
            stream: name of the purpose ("noise", "sampling"); names do not share numbers.
            step: logical step; steps do not share numbers either.

        Returns:
            A stream with `insecure` set. It repeats under the same three arguments.
        """
        keys_drawn = 0

        def derived_key() -> bytes:
            nonlocal keys_drawn
            keys_drawn += 1
            return hashlib.sha256(f"{seed:d}/{step:d}/{keys_drawn}/{stream}".encode()).digest()

        fixed = cls.__new__(cls)
        fixed._start(derived_key, insecure=True)
        return fixed

    def _start(self, new_key: Callable[[], bytes], insecure: bool) -> None:
        self.insecure = insecure
        self._new_key = new_key
        self._rekey()

    def _rekey(self) -> None:
        # A key is used for one stream only, so the nonce and the counter may start at zero.
        cipher = Cipher(algorithms.ChaCha20(self._new_key(), bytes(16)), mode=None)
        self._encryptor = cipher.encryptor()
        self._bytes_left = _BYTES_PER_KEY
        self._forks_seen = _forks

    def __reduce_ex__(self, protocol) -> NoReturn:
        raise TypeError("a SecureRandom cannot be pickled or copied: the copy would repeat it")

    def uint64(self, count: int) -> np.ndarray:
        """Draw uniform 64-bit words: the key stream itself, in little-endian order.

        Args:
            count: number of words.

        Returns:
            uint64 [count].
        """
        words = np.empty(count, dtype="<u8")
        for start in range(0, count, _CHUNK_WORDS):
            chunk = words[start : start + _CHUNK_WORDS].view(np.uint8)
            if self._bytes_left < len(chunk) or self._forks_seen != _forks:
                self._rekey()
            self._bytes_left -= len(chunk)
            self._encryptor.update_into(_ZEROS[: len(chunk)], chunk.data)
        return words

    def _chunks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """`count` words in pieces of bounded size, each with its place among the draws."""
        for start in range(0, count, _CHUNK_WORDS):
            stop = min(start + _CHUNK_WORDS, count)
            yield slice(start, stop), self.uint64(stop - start)

    def bernoulli_indices(self, numerator: int, denominator: int, count: int) -> np.ndarray:
        """Keep each of `count` indices independently with probability numerator / denominator.

        The probability is exact. An index is kept where a uniform real U is below p: 64 binary
        digits of U are compared with those of p, and only on a tie (probability 2^-64) are the
        next ones drawn and compared with the next digits of p. All in integers.

        Args:
            numerator: integer from 0 to `denominator`.
            denominator: positive integer.
            count: number of indices.

        Returns:
            int64 [kept], ascending, each in [0, count).

        Raises:
            ValueError: the fraction is not a probability.
            TypeError: it is not made of integers.
        """
        # Fixed-width integers would overflow in silence, and floats would not be exact.
        numerator, denominator = operator.index(numerator), operator.index(denominator)
        if not 0 <= numerator <= denominator or denominator == 0:
            raise ValueError(
                f"numerator / denominator must be a probability; found {numerator} / {denominator}"
            )
        if numerator == denominator:
            return np.arange(count)  # its threshold, 2^64, is no 64-bit word
        threshold, remainder = divmod(numerator << 64, denominator)
        kept = np.zeros(count, dtype=bool)
        tied = np.zeros(count, dtype=bool)
        for place, words in self._chunks(count):
            kept[place] = words < np.uint64(threshold)
            tied[place] = words == np.uint64(threshold)
        ties = np.flatnonzero(tied)
        if len(ties):
            kept[ties[self.bernoulli_indices(remainder, denominator, len(ties))]] = True
        return np.flatnonzero(kept)

    def gaussian(self, count: int) -> torch.Tensor:
        """Draw N(0, 1) by inversion: z = ±Phi^-1(u) with a random sign and u in (0, 1/2].

        The sign takes one bit of a word and u the other 63, so both tails have the same, full
        resolution: Phi^-1 is evaluated only where float64 is dense, near u = 0. Where u is below
        2^-11 float64 resolves more than those 63 bits, and 64 more are drawn: every sample is
        then as exact as float64 and Phi^-1 allow, and none lies beyond 13.1, let alone infinite.

        Args:
            count: number of samples.

        Returns:
            float64 [count], on the CPU.
        """
        samples = torch.empty(count, dtype=torch.float64)
        for place, words in self._chunks(count):
            signed = torch.from_numpy(words.view(np.int64))
            magnitude = signed & torch.iinfo(torch.int64).max
            u = magnitude.double()  # times 2^64
            coarse = (magnitude < 1 << 53).nonzero().squeeze(1)
            more_bits = torch.from_numpy((self.uint64(len(coarse)) + 0.5) * 2.0**-64)
            u[coarse] = magnitude[coarse] + more_bits
            z = torch.special.ndtri(u.mul_(2.0**-64))
            torch.copysign(z, signed, out=samples[place])
        return samples


def grid_spacing(noise_standard_deviation: float) -> float:
    """Spacing of the public grid on which a noised sum is released.

    The low-order bits of a floating-point sum depend on its operands, so a sum with textbook
    noise can betray the value under the noise (Mironov, CCS 2012). Rounded to a grid that depends
    on public constants alone, it carries nothing but the grid point. The spacing is the largest
    power of two up to 2^-10 of the standard deviation, for three reasons:

    - float64 arithmetic decides which grid point is nearest only when sum + noise lies within its
      own error of a cell's edge: for sums up to 2^13 standard deviations, about 2^-29 of a
      spacing. A finer grid would widen that share.
    - float32 has 24 bits of mantissa, so it holds every grid point up to 2^13 standard deviations
      exactly: 4,096 clipped examples that all point the same way at sigma 0.81 reach 5,057.
    - Rounding adds spacing^2 / 12 to the noise's variance, less than one part in ten million.

    Args:
        noise_standard_deviation: sigma times C, in the unit of the sum.

    Returns:
        A power of two in the same unit.

    Raises:
        ValueError: the standard deviation is not positive and finite.
    """
    if not 0 < noise_standard_deviation < math.inf:
        raise ValueError(
            "noise_standard_deviation must be positive and finite; "
            f"found {noise_standard_deviation}"
        )
    _, exponent = math.frexp(noise_standard_deviation)  # std in [2^(exponent-1), 2^exponent)
    return math.ldexp(1.0, exponent - 1 - _GRID_BITS)


def round_to_grid(values: torch.Tensor, spacing: float) -> torch.Tensor:
    """Round to the nearest multiples of `spacing` (ties to even).

    Dividing and multiplying by a power of two is exact in float64, so the result is a function of
    the grid point alone. That includes the sign of zero: no negative zero is returned.

    Args:
        values: float64, any shape, in the unit of `spacing`.
        spacing: a power of two, from `grid_spacing`.

    Returns:
        float64 of the same shape.

    Raises:
        ValueError: another dtype, or a spacing that is not a power of two.
    """
    if values.dtype != torch.float64:
        raise ValueError(f"values must be float64, where the noise was added; found {values.dtype}")
    if math.frexp(spacing)[0] != 0.5:
        raise ValueError(f"spacing must be a power of two; found {spacing}")
    return values.div(spacing).round_().mul_(spacing).add_(0.0)
