"""A Triton kernel that applies an activation to rows and quantizes them to 8 bits, a row a program, held in registers.

A row is held in two parts, the first a power of two: most widths are the sum of two, and nothing is computed for columns that
are not there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import activated


@triton.jit
def _read(x, column, K, NAME: tl.constexpr):
    # Rounded as the activation would be if it were stored, so that both ways give the same numbers.
    kind: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    return activated(value, NAME, kind == tl.float32).to(kind).to(tl.float32)


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr):
    """What a row with this largest absolute value is divided by."""
    return tl.maximum(largest, 1e-12) / LARGEST


@triton.jit
def _write(y, value, inverse, column, K, LARGEST: tl.constexpr):
    value = tl.minimum(tl.maximum(value * inverse, -LARGEST), LARGEST)
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < K)


@triton.jit
def _rows(x, y, scales, K, stride, LARGEST: tl.constexpr, NAME: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x, y = x + row * stride, y + row * K
    first = tl.arange(0, FIRST)
    value = _read(x, first, K, NAME)
    largest = tl.max(tl.abs(value), 0)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        more = _read(x, rest, K, NAME)
        largest = tl.maximum(largest, tl.max(tl.abs(more), 0))
    scale = scale_of(largest, LARGEST)
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    _write(y, value, inverse, first, K, LARGEST)
    if REST > 0:
        _write(y, more, inverse, rest, K, LARGEST)


def parts(K: int) -> tuple[int, int]:
    """Powers of two whose sum holds K columns: the largest that K holds whole, and what holds the rest, or zero."""
    first = 1 << (K.bit_length() - 1)
    return first, triton.next_power_of_2(K - first) if first < K else 0


def activate_quantize(x: Tensor, activation: str, largest: float) -> tuple[Tensor, Tensor]:
    """x (N, K) -> its activation in e4m3 (N, K) and what each row was divided by (N, 1)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    N, K = x.shape
    y, scales = x.new_empty(N, K, dtype=torch.float8_e4m3fn), x.new_empty(N, 1, dtype=torch.float32)
    first, rest = parts(K)
    with torch.cuda.device_of(x):
        _rows[(N,)](
            *(x, y, scales, K, x.stride(0)),
            **{"LARGEST": largest, "NAME": activation, "FIRST": first, "REST": rest},
            num_warps=max(1, min(16, first // 512)),
        )
    return y, scales
