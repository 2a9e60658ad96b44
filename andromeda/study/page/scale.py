"""From figures to places on a chart, and which figures stand at the axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FACTORS = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,))
"""Which multiples of powers of ten stand at a logarithmic axis."""

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A stretch of figures [low, high] over pixels [begin, end], linear or logarithmic."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a figure."""
        f: Callable[[float], float] = math.log if self.log else float
        share = (f(max(value, self.low) if self.log else value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.begin + share * (self.end - self.begin)

    def ticks(self, count: int) -> list[float]:
        """About `count` round figures within."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def spread(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """The least and the greatest, with a little room, and never the same; zero: from 0 on."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        return (low / 1.1, high * 1.1) if high / low > 1.05 else (low / 2, high * 2)
    low = min(low, 0.0) if zero else low
    low, high = apart(low, high)
    room = 0.05 * (high - low)
    return (low if zero and low == 0 else low - room), high + room


def apart(low: float, high: float) -> tuple[float, float]:
    """The same ends, or some around them where they are too near each other to be told apart."""
    size = max(abs(low), abs(high))
    by = 0.0 if high - low > 1e-9 * size else 0.1 * size or 1.0
    return low - by, high + by


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in STEPS if s * power >= raw * 0.7) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten (or of a power of ten, where they are many); between few of them also some multiples."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [[f * 10.0**p for p in range(first, last + 1) for f in factors if low <= f * 10.0**p <= high] for factors in FACTORS]
    # The finest that is not too many; the coarsest of all is thinned where a scale spans very many powers.
    ticks = next((ticks for ticks in found if len(ticks) <= count + 1), found[-1])
    return ticks if len(ticks) <= count + 1 else ticks[:: math.ceil(len(ticks) / count)]
