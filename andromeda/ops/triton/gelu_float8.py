"""GELU between two products in 8 bits: both passes write what the products read, in rows and transposed, and no other numbers.

The scales are known before, from bounds of the products (ops/mlp_float8.py). Arithmetic is in float32. Shapes: N rows, a multiple of
4, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import gelu_and_derivative, gelu_fast
from andromeda.ops.triton.float8 import TRITON_DTYPES, TileConfig, as_byte, num_tiles, store_transposed, tile_index, to_float8
from andromeda.ops.triton.tuples import tuple_append

FP8_FORWARD_TILE, FP8_BACKWARD_TILE = TileConfig(8, 256, 4), TileConfig(64, 64, 4)
FP8_BACKWARD_REGISTERS = 96
"""Of a thread in the backward pass: five programs at once on a multiprocessor, where the compiler would leave fewer."""


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
    A: tl.constexpr, A_FP8_MAX: tl.constexpr, DZ_FP8_MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    a_inverse, dz_inverse = 1.0 / tl.load(a_scale), 1.0 / tl.load(dz_scale)
    down, across = tile_index(N, H, ROWS, COLUMNS)
    four = down * (ROWS // 4) + tl.arange(0, ROWS // 4)[:, None]
    column = across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS // 4, COLUMNS), tl.float32)
    a_rows, dz_rows = (), ()
    for byte in tl.static_range(4):
        row = 4 * four + byte
        offsets, mask = row.to(tl.int64) * H + column, (row < N) & (column < H)
        z = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32) + b
        upstream = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(z)
        d = upstream * derivative
        total += d
        rounded = to_float8(d * dz_inverse, dz.dtype.element_ty, DZ_FP8_MAX)
        tl.store(dz + offsets, rounded, mask=mask)
        dz_rows = tuple_append(dz_rows, as_byte(rounded))
        a_rows = tuple_append(a_rows, as_byte(to_float8(value * a_inverse, A, A_FP8_MAX)))
    store_transposed(dz_columns, dz_rows, N, H, down, across, ROWS, COLUMNS)
    store_transposed(a_columns, a_rows, N, H, down, across, ROWS, COLUMNS)
    one = across * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + down.to(tl.int64) * H + one, tl.sum(total, 0), mask=one < H)


def gelu_fp8(u: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """GELU(u + bias) over scale () in 8 bits (N, H); u (N, H) in one piece, bias (H,)."""
    N, H = u.shape
    a = torch.empty(N, H, dtype=dtype, device=u.device)
    grid = triton.cdiv(N, FP8_FORWARD_TILE.rows), triton.cdiv(H, FP8_FORWARD_TILE.columns)
    constants = {"LARGEST": torch.finfo(dtype).max, "ROWS": FP8_FORWARD_TILE.rows, "COLUMNS": FP8_FORWARD_TILE.columns}
    with torch.cuda.device_of(u):
        _gelu_fp8_kernel[grid](u, bias, scale, a, N, H, **constants, num_warps=FP8_FORWARD_TILE.warps)
    return a


def gelu_fp8_backward(
    da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, dz_scale: Tensor, a_dtype: torch.dtype, dz_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient da (N, H) of a = GELU(u + bias), z = u + bias -> dz (N, H), dz^T (H, N), a^T (H, N) in 8 bits, bias's gradient (H,).

    dz and a are divided by their scales before they are rounded; the bias's gradient is summed in float32 before that.
    """
    N, H = u.shape
    dz = torch.empty(N, H, dtype=dz_dtype, device=u.device)
    dz_columns, a_columns = dz.new_empty(H, N), torch.empty(H, N, dtype=a_dtype, device=u.device)
    sums = torch.empty(triton.cdiv(N, FP8_BACKWARD_TILE.rows), H, dtype=torch.float32, device=u.device)
    constants = {"A": TRITON_DTYPES[a_dtype], "A_LARGEST": torch.finfo(a_dtype).max, "DZ_LARGEST": torch.finfo(dz_dtype).max}
    words = dz_columns.view(torch.int32), a_columns.view(torch.int32)
    with torch.cuda.device_of(u):
        _gelu_fp8_backward_kernel[(num_tiles(N, H, FP8_BACKWARD_TILE),)](
            *(da, u, bias, a_scale, dz_scale, dz, *words, sums, N, H),
            **constants, ROWS=FP8_BACKWARD_TILE.rows, COLUMNS=FP8_BACKWARD_TILE.columns, num_warps=FP8_BACKWARD_TILE.warps,
            maxnreg=FP8_BACKWARD_REGISTERS,
        )  # fmt: skip
    return dz, dz_columns, a_columns, sums.sum(0)
