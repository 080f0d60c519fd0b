"""A keyed permutation of [0, n) that is computed, never stored (design 4.8).

A shuffle index over 15.5T tokens takes tens of gigabytes on every rank. Here the shuffled
position of a window is a function of (key, position): a Feistel network (Luby and Rackoff,
"How to construct pseudorandom permutations", 1988) in the form of Black and Rogaway for
arbitrary domains ("Ciphers with arbitrary finite domains", 2002, section 5). A position is
written as two digits, x = left * b + right with left < a, right < b, a = ceil(sqrt n),
b = ceil(n / a); each round adds to one digit, modulo its base, a hash of the other, which
is undone by subtracting. That permutes [0, a*b); since a*b - n < a, a result beyond n is
rare (one in sqrt n) and is encrypted again until it falls inside ("cycle walking").

Not a cipher: the key is no secret, only the mixing matters.
"""

import hashlib
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
MAX_SIZE = 1 << 63
_MASK = (1 << 64) - 1
# Odd multipliers of SplitMix64's finaliser (Steele, Lea, Flood 2014).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Permutation:
    """The bijection of [0, size) chosen by any sequence of key parts (integers or names).

    O(1) memory; a look-up is 8 rounds. Scalars and arrays give the same numbers on every
    machine: only 64-bit integer arithmetic is used. Raises ValueError if size is outside
    [1, 2^63], IndexError if a position is outside [0, size).
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"size must lie in [1, 2^63], got {size}")
        self.size = size
        self._a = isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        # repr tells 1 from "1" and ("a", "b") from ("ab",), unlike joined text.
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def __call__(self, position: int) -> int:
        """Where `position` goes."""
        x = self._inside(position)
        while True:
            left, right = divmod(x, self._b)
            for r in range(0, ROUNDS, 2):
                left = (left + _below(right, self._keys[r], self._a)) % self._a
                right = (right + _below(left, self._keys[r + 1], self._b)) % self._b
            x = left * self._b + right
            if x < self.size:
                return x

    def inverse(self, position: int) -> int:
        """The position that goes to `position`."""
        x = self._inside(position)
        while True:
            left, right = divmod(x, self._b)
            for r in reversed(range(0, ROUNDS, 2)):
                right = (right - _below(left, self._keys[r + 1], self._b)) % self._b
                left = (left - _below(right, self._keys[r], self._a)) % self._a
            x = left * self._b + right
            if x < self.size:
                return x

    def array(self, positions: NDArray[Any]) -> NDArray[np.int64]:
        """Where each position goes, int64, shaped like `positions`."""
        x = np.asarray(positions)
        if x.size and (int(x.min()) < 0 or int(x.max()) >= self.size):
            raise IndexError(f"positions must lie in [0, {self.size})")
        image = self._once(x.reshape(-1).astype(np.uint64))
        while (outside := image >= np.uint64(self.size)).any():
            image[outside] = self._once(image[outside])
        return image.astype(np.int64).reshape(x.shape)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for r in range(0, ROUNDS, 2):
            left += _below_array(right, self._keys[r], a)
            left -= a * (left >= a)
            right += _below_array(left, self._keys[r + 1], b)
            right -= b * (right >= b)
        return np.asarray(left * b + right)

    def _inside(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside [0, {self.size})")
        return position


def _below(x: int, key: int, bound: int) -> int:
    """A hash of (x, key) in [0, bound), bound at most 2^32."""
    h = ((x ^ key) * _FIRST) & _MASK
    h = ((h ^ (h >> 31)) * _SECOND) & _MASK
    # The upper half is the best mixed one; multiply-shift scales it without a division.
    return ((h >> 32) * bound) >> 32


def _below_array(x: NDArray[np.uint64], key: int, bound: np.uint64) -> NDArray[np.uint64]:
    h = x ^ np.uint64(key)
    h *= np.uint64(_FIRST)  # arrays wrap modulo 2^64
    h ^= h >> np.uint64(31)
    h *= np.uint64(_SECOND)
    h >>= np.uint64(32)
    h *= bound
    h >>= np.uint64(32)
    return h
