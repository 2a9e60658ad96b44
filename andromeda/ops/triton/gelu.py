"""GELU between the two products of a feed-forward network: the bias before it, both passes, and the bias's gradient in one reading.

A program takes some rows of a few columns. Its sum over those rows stays in registers until the end, so that the gradient of
the bias costs no pass of its own. Arithmetic is in float32. Shapes: N rows, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import gelu_and_derivative, gelu_fast

GELU_COLUMNS, GELU_WARPS = 256, 4
"""A warp reads a row of a program's columns at once, 16 bytes a thread."""
ROWS_PER_STEP = 4
"""Rows of a program that are under way at once."""
ROWS_PER_PROGRAM = 128
"""Rows of a program: one partial sum each, which a second pass adds up."""


@triton.jit
def _offsets(N, H, first, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """Of STEP rows from `first` on and a program's columns: offsets, which of them exist, and the columns, each (STEP, COLUMNS)."""
    row = first + tl.arange(0, ROWS_PER_STEP)[:, None] + tl.zeros((1, GELU_COLUMNS), tl.int32)
    column = tl.program_id(1) * GELU_COLUMNS + tl.arange(0, GELU_COLUMNS)[None, :] + tl.zeros((ROWS_PER_STEP, 1), tl.int32)
    return row.to(tl.int64) * H + column, (row < N) & (column < H), column


@triton.jit
def _load_bias(bias, column, H):
    """One number for each place, so that a thread holds the numbers it adds and none are moved between threads."""
    return tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)


@triton.jit
def _gelu_kernel(u, bias, a, N, H, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    offsets, mask, column = _offsets(N, H, tl.program_id(0) * ROWS_PER_STEP, ROWS_PER_STEP, GELU_COLUMNS)
    z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + _load_bias(bias, column, H)
    tl.store(a + offsets, gelu_fast(z).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward_kernel(da, u, bias, dz, a, sums, N, H, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    b = _load_bias(bias, _offsets(N, H, 0, ROWS_PER_STEP, GELU_COLUMNS)[2], H)
    total = tl.zeros((ROWS_PER_STEP, GELU_COLUMNS), tl.float32)
    for start in range(0, ROWS_PER_PROGRAM, ROWS_PER_STEP):
        offsets, mask, _ = _offsets(N, H, tl.program_id(0) * ROWS_PER_PROGRAM + start, ROWS_PER_STEP, GELU_COLUMNS)
        z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + b
        upstream = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(z)
        d = upstream * derivative
        tl.store(a + offsets, value.to(a.dtype.element_ty), mask=mask)
        tl.store(dz + offsets, d.to(dz.dtype.element_ty), mask=mask)
        total += d
    column = tl.program_id(1) * GELU_COLUMNS + tl.arange(0, GELU_COLUMNS)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + column, tl.sum(total, 0), mask=column < H)


def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU of u (N, H) in 16 bits plus bias (H,): (N, H)."""
    u = u.contiguous()
    N, H = u.shape
    a = torch.empty_like(u)
    with torch.cuda.device_of(u):
        if u.numel():
            _gelu_kernel[(triton.cdiv(N, 2 * ROWS_PER_STEP), triton.cdiv(H, GELU_COLUMNS))](
                u, bias, a, N, H, STEP=2 * ROWS_PER_STEP, COLUMNS=GELU_COLUMNS, num_warps=GELU_WARPS
            )
    return a


def gelu_backward(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient da (N, H) of GELU(u + bias) -> that of u (N, H), GELU(u + bias) again, and that of the bias (H,) in float32."""
    da, u = da.contiguous(), u.contiguous()
    N, H = u.shape
    dz, a = torch.empty_like(u), torch.empty_like(u)
    sums = torch.empty(triton.cdiv(N, ROWS_PER_PROGRAM), H, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        if u.numel():
            grid = (len(sums), triton.cdiv(H, GELU_COLUMNS))
            _gelu_backward_kernel[grid](
                da, u, bias, dz, a, sums, N, H, ROWS=ROWS_PER_PROGRAM, STEP=ROWS_PER_STEP, COLUMNS=GELU_COLUMNS, num_warps=GELU_WARPS
            )
    return dz, a, sums.sum(0)
