"""Permutations that depend on their key alone: not on a library's version, not on what was drawn before."""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood 2014), a bijection of uint64; any shape."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. count - 1 as int64 (count,), drawn by the key: the order of splitmix64 outputs."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = mix(state + GOLDEN * np.uint64((part + 1) % 2**64))
        draws = mix(state + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return np.argsort(draws, kind="stable")
