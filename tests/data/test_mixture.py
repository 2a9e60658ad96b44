"""Shares and permutations against closed forms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.mixture import MAX_PERIOD, MixtureSchedule, ProportionalSchedule, whole_quotas
from andromeda.data.permutation import GOLDEN, mix, shuffled

weights = st.lists(st.integers(1, 40), min_size=2, max_size=9)


@given(weights=weights)
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_tijdemans_bound(weights: list[int]) -> None:
    """|rows of a source after n rows - n x share| <= 1 - 1/(2k - 2), exactly, over more than one period."""
    mixture = MixtureSchedule([float(w) for w in weights])
    k, total = len(weights), sum(weights)
    counts = [0] * k
    for n in range(1, mixture.period + 20):
        source, inside = mixture.locate(n - 1)
        assert inside == counts[source]  # each source's rows come in order, none twice, none left out
        counts[source] += 1
        for s in range(k):
            assert abs(counts[s] - Fraction(n * weights[s], total)) <= 1 - Fraction(1, 2 * k - 2)
            assert mixture.count(s, n) == counts[s]


def test_a_far_row_is_found_without_the_rows_before_it() -> None:
    mixture = MixtureSchedule([0.7, 0.2, 0.1])
    far = 10**15 + 3
    assert [mixture.count(s, far) for s in range(3)] == [
        7 * 10**14 + mixture.count(0, 3),
        2 * 10**14 + mixture.count(1, 3),
        10**14 + mixture.count(2, 3),
    ]


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [([1.0], [1]), ([0.7, 0.2, 0.1], [7, 2, 1]), ([3.0, 1.5], [2, 1]), ([1e-3, 1.0], [1, 1000]), ([5.0, 5.0, 5.0], [1, 1, 1])],
)
def test_decimal_weights_are_taken_exactly(weights: list[float], quotas: list[int]) -> None:
    assert whole_quotas(weights) == quotas


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_unwieldy_weights_are_rounded_to_the_longest_period(weights: list[float]) -> None:
    quotas = whole_quotas(weights)
    assert min(quotas) >= 1
    assert sum(quotas) <= MAX_PERIOD
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota / sum(quotas) - weight / sum(weights)) <= (len(weights) + 1) / MAX_PERIOD


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any))
def test_held_out_sources_end_together(lengths: list[int]) -> None:
    schedule = ProportionalSchedule(lengths)
    total = sum(lengths)
    seen = [schedule.locate(n) for n in range(total)]
    assert sorted(seen) == [(s, i) for s, n in enumerate(lengths) for i in range(n)]
    for n in range(total + 1):
        for s, length in enumerate(lengths):
            assert schedule.count(s, n) == sum(source == s for source, _ in seen[:n])
            assert abs(schedule.count(s, n) - n * length / total) <= 1 + len(lengths) / 2


def test_mix_is_splitmix64() -> None:
    """The first outputs for seed 0, as published with the generator's reference implementation."""
    with np.errstate(over="ignore"):
        states = GOLDEN * np.arange(1, 4, dtype=np.uint64)
    assert [hex(v) for v in mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(count=st.integers(0, 300), key=st.lists(st.integers(0, 2**70), max_size=3))
def test_shuffled_is_a_permutation(count: int, key: list[int]) -> None:
    assert sorted(shuffled(count, *key).tolist()) == list(range(count))


def test_shuffles_are_uniform_and_differ_by_key() -> None:
    """Chi-square of where element 0 of 10 goes, over 5,000 keys: 9 degrees of freedom, 99.99 % below 33.7."""
    places = np.bincount([int(np.flatnonzero(shuffled(10, seed, 3) == 0)[0]) for seed in range(5000)], minlength=10)
    assert ((places - 500.0) ** 2 / 500.0).sum() < 33.7
    assert shuffled(50, 1, 0).tolist() != shuffled(50, 0, 1).tolist()
