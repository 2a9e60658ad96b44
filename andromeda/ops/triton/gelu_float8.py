"""GELU between two products in 8 bits: both passes write what the products read, in rows and transposed, and no other numbers.

The scales are known before, from bounds of the products (ops/mlp_float8.py). Arithmetic is in float32. Shapes: N rows, a multiple of
4, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import gelu_and_slope, gelu_tail
from andromeda.ops.triton.float8 import KINDS, Tile, bits, eight_bits, place, programs, store_words
from andromeda.ops.triton.tuples import appended

FORWARD, BACKWARD = Tile(8, 256, 4), Tile(64, 64, 4)
REGISTERS = 96
"""Of a thread in the backward pass: five programs at once on a multiprocessor, where the compiler would leave fewer."""


@triton.jit
def _forward(u, bias, scale, a, N, H, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, mask = row.to(tl.int64) * H + column, (row < N) & (column < H)
    z = tl.load(u + at, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(a + at, eight_bits(gelu_tail(z) * (1.0 / tl.load(scale)), a.dtype.element_ty, LARGEST), mask=mask)


@triton.jit
def _backward(
    da, u, bias, a_scale, dz_scale, dz, dz_columns, a_columns, sums, N, H,
    A: tl.constexpr, A_LARGEST: tl.constexpr, DZ_LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    a_inverse, dz_inverse = 1.0 / tl.load(a_scale), 1.0 / tl.load(dz_scale)
    down, across = place(N, H, ROWS, COLUMNS)
    four = down * (ROWS // 4) + tl.arange(0, ROWS // 4)[:, None]
    column = across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS // 4, COLUMNS), tl.float32)
    a_rows, dz_rows = (), ()
    for byte in tl.static_range(4):
        row = 4 * four + byte
        at, mask = row.to(tl.int64) * H + column, (row < N) & (column < H)
        z = tl.load(u + at, mask=mask, other=0.0).to(tl.float32) + b
        above = tl.load(da + at, mask=mask, other=0.0).to(tl.float32)
        value, slope = gelu_and_slope(z)
        d = above * slope
        total += d
        rounded = eight_bits(d * dz_inverse, dz.dtype.element_ty, DZ_LARGEST)
        tl.store(dz + at, rounded, mask=mask)
        dz_rows = appended(dz_rows, bits(rounded))
        a_rows = appended(a_rows, bits(eight_bits(value * a_inverse, A, A_LARGEST)))
    store_words(dz_columns, dz_rows, N, H, down, across, ROWS, COLUMNS)
    store_words(a_columns, a_rows, N, H, down, across, ROWS, COLUMNS)
    one = across * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + down.to(tl.int64) * H + one, tl.sum(total, 0), mask=one < H)


def forward(u: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """GELU(u + bias) over scale () in 8 bits (N, H); u (N, H) in one piece, bias (H,)."""
    N, H = u.shape
    a = torch.empty(N, H, dtype=dtype, device=u.device)
    grid = triton.cdiv(N, FORWARD.rows), triton.cdiv(H, FORWARD.columns)
    form = {"LARGEST": torch.finfo(dtype).max, "ROWS": FORWARD.rows, "COLUMNS": FORWARD.columns}
    with torch.cuda.device_of(u):
        _forward[grid](u, bias, scale, a, N, H, **form, num_warps=FORWARD.warps)
    return a


def backward(
    da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, dz_scale: Tensor, a_dtype: torch.dtype, dz_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient da (N, H) of a = GELU(u + bias), z = u + bias -> dz (N, H), dz^T (H, N), a^T (H, N) in 8 bits, bias's gradient (H,).

    dz and a are divided by their scales before they are rounded; the bias's gradient is summed in float32 before that.
    """
    N, H = u.shape
    dz = torch.empty(N, H, dtype=dz_dtype, device=u.device)
    dz_columns, a_columns = dz.new_empty(H, N), torch.empty(H, N, dtype=a_dtype, device=u.device)
    sums = torch.empty(triton.cdiv(N, BACKWARD.rows), H, dtype=torch.float32, device=u.device)
    form = {"A": KINDS[a_dtype], "A_LARGEST": torch.finfo(a_dtype).max, "DZ_LARGEST": torch.finfo(dz_dtype).max}
    words = dz_columns.view(torch.int32), a_columns.view(torch.int32)
    with torch.cuda.device_of(u):
        _backward[(programs(N, H, BACKWARD),)](
            *(da, u, bias, a_scale, dz_scale, dz, *words, sums, N, H),
            **form, ROWS=BACKWARD.rows, COLUMNS=BACKWARD.columns, num_warps=BACKWARD.warps, maxnreg=REGISTERS,
        )  # fmt: skip
    return dz, dz_columns, a_columns, sums.sum(0)
