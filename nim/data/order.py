"""The order of the samples in an epoch: a permutation that (seed, epoch) alone decides, read at any position."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from denim.nim.data.views import sample_rng

__all__ = ["Order", "keyed_words"]

TABLE = 1 << 16
ROUNDS = 12

# SplitMix64: the increment, and the two multipliers and three shifts of its output function.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S1, _S2, _S3 = np.uint64(30), np.uint64(27), np.uint64(31)


def keyed_words(seed: int, epoch: int, sample_id: int, stream: int) -> np.random.Philox:
    """Raw 64-bit words of (seed, epoch, sample id) for purposes other than views, which have stream 0.

    The bit generator of `sample_rng`, its counter 2^128 * `stream` further. NumPy promises that raw words (and not,
    for instance, `permutation`) are the same in every release.

    Args:
        seed: any int64.
        epoch: any int64.
        sample_id: any int64.
        stream: 1 for orders, 2 for replacements of bad samples.
    """
    words = sample_rng(seed, epoch, sample_id).bit_generator
    assert isinstance(words, np.random.Philox)
    return words.jumped(stream)


class Order:
    """A permutation of range(count), a function of (count, seed, epoch), evaluated by position.

    Up to 2^16 samples the permutation is the argsort of random words: every one is equally likely. Above, nothing of
    that size is kept: it is a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002). A position is a * B + b with a < A, b < B, A and B near the square root of the count; a
    round adds to a a keyed function of b, modulo A, and the next one to b one of a, modulo B. So every round is a
    bijection on A * B numbers; the few of them that lie outside range(count) are sent through again until they do not.
    The function of a round is word number b of the SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014) whose
    start is a word of Philox. Twelve rounds: six suffice against any test on fewer pairs than A (Patarin, "Security of
    random Feistel schemes with 5 or more rounds", CRYPTO 2004), the rest is margin.
    This shuffles; it hides nothing from an opponent.

    Args:
        count: number of samples, at least 1 and at most 2^62.
        seed: any int64.
        epoch: any int64.

    Raises:
        ValueError: another count.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        if not 1 <= count <= 1 << 62:
            raise ValueError(f"an order has 1 to 2^62 samples, got {count}")
        self.count = count
        # The id of a sample may be 0 as well, but its view has other words.
        words = keyed_words(seed, epoch, 0, 1)
        self._table = np.argsort(words.random_raw(count), kind="stable") if count <= TABLE else None
        rows = math.isqrt(count - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-count // rows))
        self._keys = words.random_raw(ROUNDS)

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Indices of the samples at these positions of the epoch, which lie in range(count): int64, the same shape."""
        if self._table is not None:
            return self._table[positions]
        found = self._permute(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.count)).size:
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b = np.divmod(numbers, self._columns)
        for first, second in self._keys.reshape(-1, 2):
            a = (a + _word(first, b)) % self._rows
            b = (b + _word(second, a)) % self._columns
        return a * self._columns + b


def _word(start: np.uint64, number: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Word `number` of SplitMix64, 63 bits of it, so that adding a coordinate cannot overflow."""
    z = start + number * _GOLDEN
    z = (z ^ (z >> _S1)) * _M1
    z = (z ^ (z >> _S2)) * _M2
    return (z ^ (z >> _S3)) >> np.uint64(1)
