"""Triton kernels that measure a matrix and cast it to float8, row-major and transposed, in one read.

A tile is transposed through shared memory four bytes at a time: a thread that holds four columns of four rows first transposes
these 16 bytes in registers. Shapes: N rows, K columns; N is a multiple of 4 where the transposed matrix is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.common import PTX, TileConfig, tuple_append

AMAX_COLUMNS, AMAX_WARPS = 256, 4
"""Columns that a program of `amax_and_norm_partials` reads at once, and its warps."""
CAST_TILE = TileConfig(128, 64, 4)
SWIZZLE_GROUP = tl.constexpr(8)
"""Programs proceed down this many tiles before they move right, so that concurrent programs write long runs in both layouts."""
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
"""Four words, each of four columns of one row -> four words, each of four rows of one column; the first byte is the lowest."""
TRITON_DTYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def tile_index(N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of this program's tile in the grid of tiles of (N, K)."""
    tile_rows, tile_columns = tl.cdiv(N, ROWS), tl.cdiv(K, COLUMNS)
    return tl.swizzle2d(tl.program_id(0) // tile_columns, tl.program_id(0) % tile_columns, tile_rows, tile_columns, SWIZZLE_GROUP)


def num_tiles(N: int, K: int, tile: TileConfig) -> int:
    """Number of tiles that cover (N, K)."""
    return triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.columns)


@triton.jit
def to_float8(value, dtype: tl.constexpr, FP8_MAX: tl.constexpr):
    """Round to float8 with saturation; NaN stays NaN."""
    # The PTX conversion saturates by itself.
    return (value if PTX else tl.clamp(value, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)).to(dtype)


@triton.jit
def as_byte(value):
    """The bits of a float8 value as uint8."""
    return value.to(tl.uint8, bitcast=True)


@triton.jit
def pack_bytes(a, b, c, d):
    """Bytes of four rows as one 32-bit word per column, with the byte of `a` lowest.

    Not by shifts: ptxas (CUDA 12.8) miscompiles a byte that was converted, packed and then read again as a byte: it reads a
    register that was never written.
    """
    if PTX:
        word = tl.inline_asm_elementwise(TRANSPOSE_4X4_BYTES, "=r,=r,=r,=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=4)
    else:
        word = a.to(tl.int32) | (b.to(tl.int32) << 8) | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)
    return word


@triton.jit
def store_transposed(columns, rows, N, K, tile_row, tile_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of bytes transposed into `columns` (K, N / 4), which is viewed as 32-bit words.

    rows: a tuple of four tensors (ROWS / 4, COLUMNS); the i-th holds rows i, i + 4, i + 8, ... of the tile.
    """
    packed = pack_bytes(rows[0], rows[1], rows[2], rows[3])
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    row_group = tile_row * (ROWS // 4) + tl.arange(0, ROWS // 4)[None, :]
    tl.store(columns + column.to(tl.int64) * (N // 4) + row_group, tl.trans(packed), mask=(column < K) & (row_group < N // 4))


@triton.jit
def _amax_and_norm_kernel(x, partial, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    amax, square = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + row.to(tl.int64) * K + column, mask=(row < N) & (column < K), other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(value))
        square += value * value
    out = partial + tl.program_id(0)
    tl.store(out, tl.max(tl.max(amax, 1), 0))
    tl.store(out + tl.num_programs(0), tl.sqrt(tl.max(tl.sum(square, 1), 0)))


@triton.jit
def _cast_kernel(
    x, scale, rows, columns, sums, N, K, FP8_MAX: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    inverse = 1.0 / tl.load(scale)
    tile_row, tile_column = tile_index(N, K, ROWS, COLUMNS)
    row_group = tile_row * (ROWS // 4) + tl.arange(0, ROWS // 4)[:, None]
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    byte_rows = ()
    total = tl.zeros((ROWS // 4, COLUMNS), tl.float32)
    for byte in tl.static_range(4):
        row = 4 * row_group + byte
        offsets, mask = row.to(tl.int64) * K + column, (row < N) & (column < K)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if sums is not None:
            total += value
        y = to_float8(value * inverse, dtype, FP8_MAX)
        tl.store(rows + offsets, y, mask=mask)
        byte_rows = tuple_append(byte_rows, as_byte(y))
    if columns is not None:
        store_transposed(columns, byte_rows, N, K, tile_row, tile_column, ROWS, COLUMNS)
    if sums is not None:
        sum_column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(sums + tile_row.to(tl.int64) * K + sum_column, tl.sum(total, 0), mask=sum_column < K)


def amax_and_norm_partials(x: Tensor, rows_per_partial: int) -> Tensor:
    """x (N, K) contiguous -> largest absolute value and largest L2 norm of a row in each group of rows, (2, groups) in float32."""
    N, K = x.shape
    partial = torch.empty(2, triton.cdiv(N, rows_per_partial), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _amax_and_norm_kernel[(partial.shape[1],)](x, partial, N, K, ROWS=rows_per_partial, COLUMNS=AMAX_COLUMNS, num_warps=AMAX_WARPS)
    return partial


def cast_to_float8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool = True, row_sum: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (N, K) contiguous over scale () in float8: row-major (N, K), transposed (K, N), and the sum of x's rows (K,) in float32.

    columns, row_sum: whether the second and the third are computed; None otherwise.
    """
    N, K = x.shape
    by_row = torch.empty(N, K, dtype=dtype, device=x.device)
    by_column = torch.empty(K, N, dtype=dtype, device=x.device) if columns else None
    sums = torch.empty(triton.cdiv(N, CAST_TILE.rows), K, dtype=torch.float32, device=x.device) if row_sum else None
    words = None if by_column is None else by_column.view(torch.int32)
    constants = {"FP8_MAX": torch.finfo(dtype).max, "dtype": TRITON_DTYPES[dtype], "ROWS": CAST_TILE.rows, "COLUMNS": CAST_TILE.columns}
    with torch.cuda.device_of(x):
        _cast_kernel[(num_tiles(N, K, CAST_TILE),)](x, scale, by_row, words, sums, N, K, **constants, num_warps=CAST_TILE.warps)
    return by_row, by_column, None if sums is None else sums.sum(0)
