"""Timing, and the measured roofline of this device.

Several functions are timed in alternation, so that other load on the machine affects all of them alike. Rooflines are large matmuls
and a large copy, measured before anything is compared with them: datasheet figures are never reached, and two cards of one
model differ. Matmuls are of random 8,192 x 8,192 matrices (zeros run faster on a GPU, which then draws less power); a copy counts
bytes read and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from andromeda.ops.activation import FLOAT8_DTYPE
from andromeda.utils.hardware import Hardware, recognize
from andromeda.utils.log import get_logger

Key = TypeVar("Key", bound=Hashable)

log = get_logger(__name__)
TELL_EVERY = 10.0
"""Seconds between two lines about the rounds done."""


def time_alternately(functions: Mapping[Key, Callable[[int], object]], warmup: int, rounds: int) -> dict[Key, list[float]]:
    """Seconds of each function in every timed round.

    A round calls every function once with the round's number, in the given order in even rounds and reversed in odd ones, so
    that no function always follows the same other one. The first `warmup` rounds are not counted.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in functions}
    due = 0.0
    for number in range(warmup + rounds):
        if time.monotonic() >= due:
            log.info("round %d of %d", number + 1, warmup + rounds)
            due = time.monotonic() + TELL_EVERY
        for key in list(functions)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            functions[key](number)
            if number >= warmup:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def median_ms(function: Callable[[], object], device: str, rep: int, graph: bool = False) -> float:
    """Median milliseconds of a call over about `rep` milliseconds; on a GPU with a cold L2 cache, or replayed from a CUDA graph.

    A call that takes longer than `rep` is timed once, after one call that is not counted by the caller. A graph excludes launch
    overhead, but nothing flushes the cache between its calls: give it more data than the cache holds.
    """
    if device == "cpu":
        from torch.utils.benchmark import Timer

        return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=rep / 1e3).median * 1e3
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        return float(do_bench_cudagraph(function, rep=rep, return_mode="median"))
    once = _once_ms(function)
    # Triton calls a function at least eight times, which takes minutes for the longest prompts.
    if once > rep:
        return once
    return float(do_bench(function, warmup=rep // 2, rep=rep, return_mode="median"))


def _once_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


SIDE, COPIED, REP = 8192, 4 << 30, 200
"""Rows and columns of a matrix, bytes of a copy, milliseconds of timing for each."""


def measured_hardware(device: torch.device) -> Hardware | None:
    """The device with its measured rates, measured once per process; None on a CPU."""
    return _measured(device.index or 0) if device.type == "cuda" else None


@cache
def _measured(index: int) -> Hardware:
    device = torch.device("cuda", index)
    name = torch.cuda.get_device_name(device)
    known = recognize(name) or Hardware(name, float(torch.cuda.mem_get_info(device)[1]), 1.0, {}, "measured now")
    measured = {
        "bf16": _bf16_matmul_rate(device),
        **({"fp8": _fp8_matmul_rate(device)} if torch.cuda.get_device_capability(device) >= (8, 9) else {}),
    }
    found = replace(known, bandwidth=_copy_rate(device), measured=measured)
    torch.cuda.empty_cache()
    return found


def roofline_figures() -> dict[str, Any]:
    """The measured roofline for a result: TFLOP/s and TB/s; empty if none was measured."""
    if not _measured.cache_info().currsize:
        return {}
    found = _measured(torch.cuda.current_device())
    rates = {name: rate / 1e12 for name, rate in found.measured.items()}
    return {"ceilings": {"tflops": rates, "copy_tb_per_s": found.bandwidth / 1e12}}


def _bf16_matmul_rate(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * SIDE**3 / median_ms(lambda: a @ b, device.type, REP)


def _fp8_matmul_rate(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device).to(FLOAT8_DTYPE) for _ in range(2))
    one = torch.ones((), device=device)

    def matmul() -> Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2e3 * SIDE**3 / median_ms(matmul, device.type, REP)


def _copy_rate(device: torch.device) -> float:
    source, target = (torch.empty(COPIED // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return 1e3 * COPIED / median_ms(lambda: target.copy_(source), device.type, REP)
