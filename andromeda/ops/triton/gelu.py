"""GELU between the two matmuls of a feed-forward network, forward and backward, with 16-bit or float8 results.

Each backward kernel computes the activation again, multiplies its derivative with the upstream gradient and sums the bias
gradient, all in one pass over the data: a program keeps the sums of its rows in registers until the end. The float8 kernels
write what the float8 matmuls read, row-major and transposed, and nothing in 16 bits; their scales are known beforehand, from
bounds on the matmuls (`ops/mlp.py`). Arithmetic is in float32.

Shapes: N rows (a multiple of 4 for float8), H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import gelu_and_derivative, gelu_fast
from andromeda.ops.triton.common import TileConfig, tuple_append
from andromeda.ops.triton.float8 import TRITON_DTYPES, as_byte, num_tiles, store_transposed, tile_index, to_float8

GELU_COLUMNS, GELU_WARPS = 256, 4
"""Columns of a program, of which a warp reads one row at once with 16 bytes per thread, and its warps."""
ROWS_PER_STEP = 4
"""Rows that a program loads at once."""
ROWS_PER_PROGRAM = 128
"""Rows of a program in the backward pass: it writes one partial sum of the bias gradient."""
FP8_FORWARD_TILE, FP8_BACKWARD_TILE = TileConfig(8, 256, 4), TileConfig(64, 64, 4)
FP8_BACKWARD_REGISTERS = 96
"""Registers per thread: five programs then fit on a multiprocessor, more than with the compiler's own choice."""


@triton.jit
def _offsets(N, H, first, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """For STEP rows from `first` on and the columns of this program: offsets, mask and column indices, each (STEP, COLUMNS)."""
    row = first + tl.arange(0, STEP)[:, None] + tl.zeros((1, COLUMNS), tl.int32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :] + tl.zeros((STEP, 1), tl.int32)
    return row.to(tl.int64) * H + column, (row < N) & (column < H), column


@triton.jit
def _load_bias(bias, column, H):
    """The bias as a full (STEP, COLUMNS) tile: each thread loads the values that it adds, so that threads exchange nothing."""
    return tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)


@triton.jit
def _gelu_kernel(u, bias, a, N, H, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    offsets, mask, column = _offsets(N, H, tl.program_id(0) * STEP, STEP, COLUMNS)
    z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + _load_bias(bias, column, H)
    tl.store(a + offsets, gelu_fast(z).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward_kernel(da, u, bias, dz, a, sums, N, H, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    b = _load_bias(bias, _offsets(N, H, 0, STEP, COLUMNS)[2], H)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        offsets, mask, _ = _offsets(N, H, tl.program_id(0) * ROWS + start, STEP, COLUMNS)
        z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + b
        upstream = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(z)
        d = upstream * derivative
        tl.store(a + offsets, value.to(a.dtype.element_ty), mask=mask)
        tl.store(dz + offsets, d.to(dz.dtype.element_ty), mask=mask)
        total += d
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + column, tl.sum(total, 0), mask=column < H)


def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU(u + bias) (N, H) in the dtype of u; u (N, H) in 16 bits, bias (H,)."""
    u = u.contiguous()
    N, H = u.shape
    a = torch.empty_like(u)
    with torch.cuda.device_of(u):
        if u.numel():
            grid = (triton.cdiv(N, 2 * ROWS_PER_STEP), triton.cdiv(H, GELU_COLUMNS))
            _gelu_kernel[grid](u, bias, a, N, H, STEP=2 * ROWS_PER_STEP, COLUMNS=GELU_COLUMNS, num_warps=GELU_WARPS)
    return a


def gelu_backward(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient da (N, H) of a = GELU(u + bias): the gradient of u (N, H), a itself, and the bias gradient (H,) in float32."""
    da, u = da.contiguous(), u.contiguous()
    N, H = u.shape
    dz, a = torch.empty_like(u), torch.empty_like(u)
    sums = torch.empty(triton.cdiv(N, ROWS_PER_PROGRAM), H, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        if u.numel():
            _gelu_backward_kernel[(len(sums), triton.cdiv(H, GELU_COLUMNS))](
                *(da, u, bias, dz, a, sums, N, H),
                ROWS=ROWS_PER_PROGRAM,
                STEP=ROWS_PER_STEP,
                COLUMNS=GELU_COLUMNS,
                num_warps=GELU_WARPS,
            )
    return dz, a, sums.sum(0)


@triton.jit
def _gelu_fp8_kernel(u, bias, scale, a, N, H, FP8_MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offsets, mask = row.to(tl.int64) * H + column, (row < N) & (column < H)
    z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(a + offsets, to_float8(gelu_fast(z) * (1.0 / tl.load(scale)), a.dtype.element_ty, FP8_MAX), mask=mask)


@triton.jit
def _gelu_fp8_backward_kernel(
    da, u, bias, a_scale, dz_scale, dz, dz_columns, a_columns, sums, N, H,
    A: tl.constexpr, A_MAX: tl.constexpr, DZ_MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    a_inverse, dz_inverse = 1.0 / tl.load(a_scale), 1.0 / tl.load(dz_scale)
    tile_row, tile_column = tile_index(N, H, ROWS, COLUMNS)
    row_group = tile_row * (ROWS // 4) + tl.arange(0, ROWS // 4)[:, None]
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS // 4, COLUMNS), tl.float32)
    a_rows, dz_rows = (), ()
    for byte in tl.static_range(4):
        row = 4 * row_group + byte
        offsets, mask = row.to(tl.int64) * H + column, (row < N) & (column < H)
        z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + b
        upstream = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(z)
        d = upstream * derivative
        total += d
        rounded = to_float8(d * dz_inverse, dz.dtype.element_ty, DZ_MAX)
        tl.store(dz + offsets, rounded, mask=mask)
        dz_rows = tuple_append(dz_rows, as_byte(rounded))
        a_rows = tuple_append(a_rows, as_byte(to_float8(value * a_inverse, A, A_MAX)))
    store_transposed(dz_columns, dz_rows, N, H, tile_row, tile_column, ROWS, COLUMNS)
    store_transposed(a_columns, a_rows, N, H, tile_row, tile_column, ROWS, COLUMNS)
    sum_column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + tile_row.to(tl.int64) * H + sum_column, tl.sum(total, 0), mask=sum_column < H)


def gelu_fp8(u: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """GELU(u + bias) / scale (N, H) in the float8 `dtype`; u (N, H) contiguous, bias (H,), scale ()."""
    N, H = u.shape
    a = torch.empty(N, H, dtype=dtype, device=u.device)
    grid = triton.cdiv(N, FP8_FORWARD_TILE.rows), triton.cdiv(H, FP8_FORWARD_TILE.columns)
    constants = {"FP8_MAX": torch.finfo(dtype).max, "ROWS": FP8_FORWARD_TILE.rows, "COLUMNS": FP8_FORWARD_TILE.columns}
    with torch.cuda.device_of(u):
        _gelu_fp8_kernel[grid](u, bias, scale, a, N, H, **constants, num_warps=FP8_FORWARD_TILE.warps)
    return a


def gelu_fp8_backward(
    da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, dz_scale: Tensor, a_dtype: torch.dtype, dz_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient da (N, H) of a = GELU(z), z = u + bias: dz (N, H), dz^T (H, N), a^T (H, N) in float8, bias gradient (H,).

    dz and a are divided by their scales () before they are rounded; the bias gradient is a float32 sum of the unrounded dz.
    """
    N, H = u.shape
    dz = torch.empty(N, H, dtype=dz_dtype, device=u.device)
    dz_columns, a_columns = dz.new_empty(H, N), torch.empty(H, N, dtype=a_dtype, device=u.device)
    sums = torch.empty(triton.cdiv(N, FP8_BACKWARD_TILE.rows), H, dtype=torch.float32, device=u.device)
    constants = {"A": TRITON_DTYPES[a_dtype], "A_MAX": torch.finfo(a_dtype).max, "DZ_MAX": torch.finfo(dz_dtype).max}
    words = dz_columns.view(torch.int32), a_columns.view(torch.int32)
    with torch.cuda.device_of(u):
        _gelu_fp8_backward_kernel[(num_tiles(N, H, FP8_BACKWARD_TILE),)](
            *(da, u, bias, a_scale, dz_scale, dz, *words, sums, N, H),
            **constants,
            ROWS=FP8_BACKWARD_TILE.rows,
            COLUMNS=FP8_BACKWARD_TILE.columns,
            num_warps=FP8_BACKWARD_TILE.warps,
            maxnreg=FP8_BACKWARD_REGISTERS,
        )
    return dz, dz_columns, a_columns, sums.sum(0)
