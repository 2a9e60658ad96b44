"""A Triton kernel that applies an activation to rows and quantises them to 8 bits, a row a program, held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activated(x, NAME: tl.constexpr):
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    x = tl.maximum(x, 0.0)
    return x * x if NAME == "relu2" else x


@triton.jit
def _rows(x, y, scales, K, stride, LARGEST: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < K
    # Rounded as the activation would be if it were stored, so that both ways give the same numbers.
    value = _activated(tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32), NAME).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    value = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
    tl.store(y + row * K + column, value.to(y.dtype.element_ty), mask=mask)


def activate_quantise(x: Tensor, activation: str, largest: float) -> tuple[Tensor, Tensor]:
    """x (N, K) -> its activation in e4m3 (N, K) and what each row was divided by (N, 1)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    N, K = x.shape
    y, scales = x.new_empty(N, K, dtype=torch.float8_e4m3fn), x.new_empty(N, 1, dtype=torch.float32)
    block = triton.next_power_of_2(K)
    with torch.cuda.device_of(x):
        _rows[(N,)](x, y, scales, K, x.stride(0), LARGEST=largest, NAME=activation, BLOCK=block, num_warps=max(1, min(16, block // 512)))
    return y, scales
