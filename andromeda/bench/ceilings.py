"""What this device reaches at most: large matrix products and a large copy, measured before anything is set beside them.

A datasheet's figures are never reached, and two cards of one name differ; so floors and shares are against these. Products are
of random numbers (zeros run faster on a GPU, which then draws less power), 8,192 cubed; a copy counts bytes read and written.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.timing import median_ms
from andromeda.ops.activation import FLOAT8_DTYPE
from andromeda.utils.hardware import Hardware, recognize

SIDE, COPIED, REP = 8192, 4 << 30, 200
"""Rows and columns of a matrix, bytes of a copy, milliseconds for which each is timed."""


def measured_hardware(device: torch.device) -> Hardware | None:
    """The device with its measured rates, which are measured once a process; None on a CPU."""
    return _measured(device.index or 0) if device.type == "cuda" else None


@cache
def _measured(index: int) -> Hardware:
    device = torch.device("cuda", index)
    name = torch.cuda.get_device_name(device)
    known = recognize(name) or Hardware(name, float(torch.cuda.mem_get_info(device)[1]), 1.0, {}, "measured now")
    measured = {"bf16": _product(device), **({"fp8": _product8(device)} if torch.cuda.get_device_capability(device) >= (8, 9) else {})}
    found = replace(known, bandwidth=_copy(device), measured=measured)
    torch.cuda.empty_cache()
    return found


def figures() -> dict[str, Any]:
    """What was measured so far, for a result: TFLOP/s and TB/s; nothing where no floor was asked for."""
    if not _measured.cache_info().currsize:
        return {}
    found = _measured(torch.cuda.current_device())
    rates = {name: rate / 1e12 for name, rate in found.measured.items()}
    return {"ceilings": {"tflops": rates, "copy_tb_per_s": found.bandwidth / 1e12}}


def _product(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * SIDE**3 / median_ms(lambda: a @ b, device.type, REP)


def _product8(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device).to(FLOAT8_DTYPE) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2e3 * SIDE**3 / median_ms(product, device.type, REP)


def _copy(device: torch.device) -> float:
    source, target = (torch.empty(COPIED // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return 1e3 * COPIED / median_ms(lambda: target.copy_(source), device.type, REP)
