"""A Triton kernel that applies an activation to rows and quantizes them to 8 bits, a row a program, held in registers.

A row is held in two parts, the first a power of two: most widths are the sum of two, and nothing is computed for columns that
are not there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import apply_activation


@triton.jit
def _load_activated(x, column, K, NAME: tl.constexpr):
    # Rounded as the activation would be if it were stored, so that both ways give the same numbers.
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    return apply_activation(value, NAME, dtype == tl.float32).to(dtype).to(tl.float32)


@triton.jit
def row_scale(amax, FP8_MAX: tl.constexpr):
    """What a row with this largest absolute value is divided by."""
    return tl.maximum(amax, 1e-12) / FP8_MAX


@triton.jit
def _store_quantized(y, value, inverse, column, K, FP8_MAX: tl.constexpr):
    value = tl.minimum(tl.maximum(value * inverse, -FP8_MAX), FP8_MAX)
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < K)


@triton.jit
def _activate_quantize_kernel(x, y, scales, K, stride, FP8_MAX: tl.constexpr, NAME: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x, y = x + row * stride, y + row * K
    first = tl.arange(0, FIRST)
    value = _load_activated(x, first, K, NAME)
    amax = tl.max(tl.abs(value), 0)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        more = _load_activated(x, rest, K, NAME)
        amax = tl.maximum(amax, tl.max(tl.abs(more), 0))
    scale = row_scale(amax, FP8_MAX)
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    _store_quantized(y, value, inverse, first, K, FP8_MAX)
    if REST > 0:
        _store_quantized(y, more, inverse, rest, K, FP8_MAX)


def split_power_of_two(K: int) -> tuple[int, int]:
    """Powers of two whose sum holds K columns: the largest that K holds whole, and what holds the rest, or zero."""
    first = 1 << (K.bit_length() - 1)
    return first, triton.next_power_of_2(K - first) if first < K else 0


def activate_quantize(x: Tensor, activation: str, amax: float) -> tuple[Tensor, Tensor]:
    """x (N, K) -> its activation in e4m3 (N, K) and what each row was divided by (N, 1)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    N, K = x.shape
    y, scales = x.new_empty(N, K, dtype=torch.float8_e4m3fn), x.new_empty(N, 1, dtype=torch.float32)
    first, rest = split_power_of_two(K)
    with torch.cuda.device_of(x):
        _activate_quantize_kernel[(N,)](
            *(x, y, scales, K, x.stride(0)),
            **{"LARGEST": amax, "NAME": activation, "FIRST": first, "REST": rest},
            num_warps=max(1, min(16, first // 512)),
        )
    return y, scales
