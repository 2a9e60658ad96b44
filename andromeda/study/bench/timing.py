"""Timing several things beside each other, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def alternate(works: Mapping[Key, Callable[[int], object]], warmup: int, rounds: int) -> dict[Key, list[float]]:
    """Seconds of each work in every timed round.

    A round calls every work once with the round's number, in the given order in even rounds and backwards in odd ones, so
    that none always follows the same other. The first `warmup` rounds are not counted.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    for number in range(warmup + rounds):
        for key in list(works)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            works[key](number)
            if number >= warmup:
                seconds[key].append(time.perf_counter() - start)
    return seconds
