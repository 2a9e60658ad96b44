"""Which source a sequence comes from: exact shares at every point of the stream, and any sequence found without the sequences before it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

MAX_PERIOD = 100_000


class MixtureSchedule:
    """An endless schedule over sources, after Tijdeman, "The chairman assignment problem" (Discrete Math. 32, 1980).

    After any number of sequences n, the sequences of a source with share p differ from n p by at most 1 - 1/(2k - 2), with k sources.
    The schedule has a period, the sum of the weights as smallest integers, after which it is exact. Weights whose period would
    exceed 100,000 sequences are rounded to multiples of 1/100,000; `shares` are the ones used.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = whole_quotas(weights)
        self.period = sum(self.quotas)
        self.shares = tuple(Fraction(q, self.period) for q in self.quotas)
        self._source = tijdeman(self.quotas)
        self._places = [np.flatnonzero(self._source == s) for s in range(len(self.quotas))]

    def locate(self, sequence: int) -> tuple[int, int]:
        """The source of a sequence and the sequence's number within that source."""
        source = int(self._source[sequence % self.period])
        return source, self.count(source, sequence)

    def count(self, source: int, sequences: int) -> int:
        """How many of the first `sequences` sequences come from a source."""
        whole, rest = divmod(sequences, self.period)
        return whole * self.quotas[source] + int(np.searchsorted(self._places[source], rest))


class ProportionalSchedule:
    """A finite schedule that exhausts sources of given lengths in proportion to their lengths (for held-out data)."""

    def __init__(self, lengths: Sequence[int]) -> None:
        source = np.repeat(np.arange(len(lengths)), lengths)
        inside = np.concatenate([np.arange(n) for n in lengths])
        order = np.argsort((inside + 0.5) / np.repeat(np.maximum(lengths, 1), lengths), kind="stable")
        self._source, self._inside = source[order], inside[order]

    def locate(self, sequence: int) -> tuple[int, int]:
        """The source of a sequence and the sequence's number within that source."""
        return int(self._source[sequence]), int(self._inside[sequence])

    def count(self, source: int, sequences: int) -> int:
        """How many of the first `sequences` sequences come from a source."""
        return int((self._source[:sequences] == source).sum())


def whole_quotas(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same proportion (a decimal weight such as 0.7 is taken as 7/10)."""
    exact = [Fraction(str(w)) for w in weights]
    scale = lcm(*(f.denominator for f in exact))
    quotas = [int(f * scale) for f in exact]
    if sum(quotas) // gcd(*quotas) > MAX_PERIOD:
        quotas = _rounded(exact)
    common = gcd(*quotas)
    return [q // common for q in quotas]


def _rounded(exact: Sequence[Fraction]) -> list[int]:
    """Shares in units of 1/LONGEST_PERIOD by largest remainder, at least one unit each."""
    total = sum(exact)
    ideal = [f / total * MAX_PERIOD for f in exact]
    quotas = [max(int(f), 1) for f in ideal]
    for i in sorted(range(len(ideal)), key=lambda i: int(ideal[i]) - ideal[i]):
        if sum(quotas) < MAX_PERIOD:
            quotas[i] += 1
    quotas[quotas.index(max(quotas))] += MAX_PERIOD - sum(quotas)
    return quotas


def tijdeman(quotas: Sequence[int]) -> np.ndarray:
    """One period of the schedule: source of each sequence, int16 (sum of quotas,).

    At step n a source may come if n p - x >= 1/(2k - 2), x being its sequences so far; of those, the one that would be due first,
    with the least (1 - 1/(2k - 2) - (n p - x)) / p. All in whole numbers, scaled by (2k - 2) and the period.
    """
    k, period = len(quotas), sum(quotas)
    if k == 1:
        return np.zeros(period, dtype=np.int16)
    slack = 2 * k - 2
    schedule = np.zeros(period, dtype=np.int16)
    debt = [0] * k  # (n p - x) in units of 1/period
    for n in range(period):
        best, due = -1, 0
        for s in range(k):
            debt[s] += quotas[s]
            if slack * debt[s] >= period:
                when = period * (slack - 1) - slack * debt[s]  # divided by the quota, compared crosswise
                if best < 0 or when * quotas[best] < due * quotas[s]:
                    best, due = s, when
        schedule[n] = best
        debt[best] -= period
    return schedule
