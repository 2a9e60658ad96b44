"""Timing several things beside each other, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def time_alternately(works: Mapping[Key, Callable[[int], object]], warmup: int, rounds: int) -> dict[Key, list[float]]:
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


def median_ms(function: Callable[[], object], device: str, rep: int, graph: bool = False) -> float:
    """Median milliseconds of a call over about `rep` milliseconds (of one that takes longer: its time once, so call it before); on a
    GPU with a cold cache, or as replayed from a graph.

    A graph leaves out what the CPU takes to start each kernel, but nothing empties the cache between calls: give it more data
    than the cache holds.
    """
    if device == "cpu":
        from torch.utils.benchmark import Timer

        return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=rep / 1e3).median * 1e3
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        return float(do_bench_cudagraph(function, rep=rep, return_mode="median"))
    once = _once_ms(function)
    # Triton calls a function eight times at least, which is minutes for the longest prompts; those need no median.
    if once > rep:
        return once
    return float(do_bench(function, warmup=rep // 2, rep=rep, return_mode="median"))


def _once_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
