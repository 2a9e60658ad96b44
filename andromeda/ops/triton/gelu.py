"""GELU between the two products of a feed-forward network: the bias before it, both passes, and the bias's gradient in one reading.

A program takes some rows of a few columns. Its sum over those rows stays in registers until the end, so that the gradient of
the bias costs no pass of its own. Arithmetic is in float32. Shapes: N rows, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import gelu_and_slope, gelu_tail

COLUMNS, WARPS = 256, 4
"""A warp reads a row of a program's columns at once, 16 bytes a thread."""
STEP = 4
"""Rows of a program that are under way at once."""
ROWS = 128
"""Rows of a program: one partial sum each, which a second pass adds up."""


@triton.jit
def _place(N, H, first, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """Of STEP rows from `first` on and a program's columns: offsets, which of them exist, and the columns, each (STEP, COLUMNS)."""
    row = first + tl.arange(0, STEP)[:, None] + tl.zeros((1, COLUMNS), tl.int32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :] + tl.zeros((STEP, 1), tl.int32)
    return row.to(tl.int64) * H + column, (row < N) & (column < H), column


@triton.jit
def _bias(bias, column, H):
    """One number for each place, so that a thread holds the numbers it adds and none are moved between threads."""
    return tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)


@triton.jit
def _forward(u, bias, a, N, H, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    at, mask, column = _place(N, H, tl.program_id(0) * STEP, STEP, COLUMNS)
    z = tl.load(u + at, mask=mask, other=0.0).to(tl.float32) + _bias(bias, column, H)
    tl.store(a + at, gelu_tail(z).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _backward(da, u, bias, dz, a, sums, N, H, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    b = _bias(bias, _place(N, H, 0, STEP, COLUMNS)[2], H)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        at, mask, _ = _place(N, H, tl.program_id(0) * ROWS + start, STEP, COLUMNS)
        z = tl.load(u + at, mask=mask, other=0.0).to(tl.float32) + b
        above = tl.load(da + at, mask=mask, other=0.0).to(tl.float32)
        value, slope = gelu_and_slope(z)
        d = above * slope
        tl.store(a + at, value.to(a.dtype.element_ty), mask=mask)
        tl.store(dz + at, d.to(dz.dtype.element_ty), mask=mask)
        total += d
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + column, tl.sum(total, 0), mask=column < H)


def forward(u: Tensor, bias: Tensor) -> Tensor:
    """GELU of u (N, H) in 16 bits plus bias (H,): (N, H)."""
    u = u.contiguous()
    N, H = u.shape
    a = torch.empty_like(u)
    with torch.cuda.device_of(u):
        if u.numel():
            _forward[(triton.cdiv(N, 2 * STEP), triton.cdiv(H, COLUMNS))](u, bias, a, N, H, STEP=2 * STEP, COLUMNS=COLUMNS, num_warps=WARPS)
    return a


def backward(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient da (N, H) of GELU(u + bias) -> that of u (N, H), GELU(u + bias) again, and that of the bias (H,) in float32."""
    da, u = da.contiguous(), u.contiguous()
    N, H = u.shape
    dz, a = torch.empty_like(u), torch.empty_like(u)
    sums = torch.empty(triton.cdiv(N, ROWS), H, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        if u.numel():
            grid = (len(sums), triton.cdiv(H, COLUMNS))
            _backward[grid](da, u, bias, dz, a, sums, N, H, ROWS=ROWS, STEP=STEP, COLUMNS=COLUMNS, num_warps=WARPS)
    return dz, a, sums.sum(0)
