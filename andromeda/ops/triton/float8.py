"""Triton kernels that measure a matrix and cast it to 8 bits, in rows and transposed, in one reading.

A tile is transposed through shared memory four bytes at a time: a thread that holds four columns of four rows turns them first, so
that nothing is moved byte by byte. N and K rows and columns; N is a multiple of 4 where it is transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.ptx import PTX
from andromeda.ops.triton.tuples import tuple_append


class TileConfig(NamedTuple):
    """What a program takes."""

    rows: int
    columns: int
    warps: int


AMAX_COLUMNS, AMAX_WARPS = 256, 4
"""Columns that a program reads at once when it measures, and its warps."""
CAST_TILE = TileConfig(128, 64, 4)
SWIZZLE_GROUP = tl.constexpr(8)
"""Programs follow each other down this many tiles, then to the right: those that run at once write long pieces in both orders."""
TRANSPOSE_4X4_BYTES = tl.constexpr("""
{
    .reg .b32 low01, high01, low23, high23;
    prmt.b32 low01, $4, $5, 0x5140;
    prmt.b32 high01, $4, $5, 0x7362;
    prmt.b32 low23, $6, $7, 0x5140;
    prmt.b32 high23, $6, $7, 0x7362;
    prmt.b32 $0, low01, low23, 0x5410;
    prmt.b32 $1, low01, low23, 0x7632;
    prmt.b32 $2, high01, high23, 0x5410;
    prmt.b32 $3, high01, high23, 0x7632;
}
""")
"""Four words of four columns each, one from each row -> four words of four rows each, one from each column; first bytes are lowest."""


@triton.jit
def tile_index(N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of this program's tile among all tiles."""
    down, across = tl.cdiv(N, ROWS), tl.cdiv(K, COLUMNS)
    return tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, SWIZZLE_GROUP)


def num_tiles(N: int, K: int, tile: TileConfig) -> int:
    """How many tiles cover (N, K)."""
    return triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.columns)


@triton.jit
def to_float8(value, dtype: tl.constexpr, FP8_MAX: tl.constexpr):
    """The nearest number of the format; what is too large becomes the largest one, and NaN stays NaN."""
    # The instruction that rounds does so too.
    return (value if PTX else tl.clamp(value, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)).to(dtype)


@triton.jit
def as_byte(value):
    """The byte of an 8-bit number."""
    return value.to(tl.uint8, bitcast=True)


@triton.jit
def pack_bytes(a, b, c, d):
    """Bytes of four rows in one 32-bit word for each column, a's lowest.

    Not by shifts: ptxas (CUDA 12.8) lets a byte that it has converted and packed be read as a byte of its own from a register
    that was never written.
    """
    if PTX:
        word = tl.inline_asm_elementwise(TRANSPOSE_4X4_BYTES, "=r,=r,=r,=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=4)
    else:
        word = a.to(tl.int32) | (b.to(tl.int32) << 8) | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)
    return word


@triton.jit
def store_transposed(columns, rows, N, K, down, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes of a tile, a tuple of every fourth row (ROWS / 4, COLUMNS) from the first, second, ... on, into its place in `columns`
    (K, N / 4)."""
    packed = pack_bytes(rows[0], rows[1], rows[2], rows[3])
    column = across * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    four = down * (ROWS // 4) + tl.arange(0, ROWS // 4)[None, :]
    tl.store(columns + column.to(tl.int64) * (N // 4) + four, tl.trans(packed), mask=(column < K) & (four < N // 4))


@triton.jit
def _amax_and_norm_kernel(x, partial, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    amax, square = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + row.to(tl.int64) * K + column, mask=(row < N) & (column < K), other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(value))
        square += value * value
    offsets = partial + tl.program_id(0)
    tl.store(offsets, tl.max(tl.max(amax, 1), 0))
    tl.store(offsets + tl.num_programs(0), tl.sqrt(tl.max(tl.sum(square, 1), 0)))


@triton.jit
def _cast_kernel(
    x, scale, rows, columns, sums, N, K, FP8_MAX: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    inverse = 1.0 / tl.load(scale)
    down, across = tile_index(N, K, ROWS, COLUMNS)
    four = down * (ROWS // 4) + tl.arange(0, ROWS // 4)[:, None]
    column = across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    transposed = ()
    want_sums = tl.zeros((ROWS // 4, COLUMNS), tl.float32)
    for byte in tl.static_range(4):
        row = 4 * four + byte
        offsets, mask = row.to(tl.int64) * K + column, (row < N) & (column < K)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if sums is not None:
            want_sums += value
        y = to_float8(value * inverse, dtype, FP8_MAX)
        tl.store(rows + offsets, y, mask=mask)
        transposed = tuple_append(transposed, as_byte(y))
    if columns is not None:
        store_transposed(columns, transposed, N, K, down, across, ROWS, COLUMNS)
    if sums is not None:
        one = across * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + down.to(tl.int64) * K + one, tl.sum(want_sums, 0), mask=one < K)


TRITON_DTYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def amax_and_norm_partials(x: Tensor, rows_per_partial: int) -> Tensor:
    """x (N, K) in one piece -> largest absolute value and largest norm of a row, each of `piece` rows, (2, pieces) in float32."""
    N, K = x.shape
    partial = torch.empty(2, triton.cdiv(N, rows_per_partial), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _amax_and_norm_kernel[(partial.shape[1],)](x, partial, N, K, ROWS=rows_per_partial, COLUMNS=AMAX_COLUMNS, num_warps=AMAX_WARPS)
    return partial


def cast_to_float8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool = True, want_sums: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (N, K) in one piece over scale () -> 8 bits (N, K), the same transposed (K, N), and the sum of x's rows (K,) in float32."""
    N, K = x.shape
    by_row = torch.empty(N, K, dtype=dtype, device=x.device)
    by_column = torch.empty(K, N, dtype=dtype, device=x.device) if columns else None
    sums = torch.empty(triton.cdiv(N, CAST_TILE.rows), K, dtype=torch.float32, device=x.device) if want_sums else None
    words = None if by_column is None else by_column.view(torch.int32)
    form = {"LARGEST": torch.finfo(dtype).max, "kind": TRITON_DTYPES[dtype], "ROWS": CAST_TILE.rows, "COLUMNS": CAST_TILE.columns}
    with torch.cuda.device_of(x):
        _cast_kernel[(num_tiles(N, K, CAST_TILE),)](x, scale, by_row, words, sums, N, K, **form, num_warps=CAST_TILE.warps)
    return by_row, by_column, None if sums is None else sums.sum(0)
