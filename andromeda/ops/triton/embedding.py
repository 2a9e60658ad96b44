"""Triton kernels for the weight gradient of an embedding: for each row of the table the sum of its tokens' gradients, without atomics.

Tokens are sorted by id, so that the tokens of a row form a segment. One program per block of columns sums a short segment in
token order, and every row is written once, zeros included. A segment of more than TOKENS_PER_PARTIAL tokens would keep one
program busy long after the others: such segments are cut where tiles of TOKENS_PER_PARTIAL sorted tokens begin, a program sums
each part, and a second kernel adds the parts. A tile holds parts of at most two long segments: that of its first token and that
of its last.

Shapes: N tokens, V rows of the table, C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.common import TileConfig

DEFAULT_TILE = TileConfig(4, 1024, 4)
"""`rows` tokens are read at once."""
TOKENS_PER_PARTIAL = 64
"""Most tokens that one program sums."""


@triton.jit
def _segment_sum(dy, order, start, end, column, stride, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of the gradients of sorted tokens start..end-1 in float32 (COLUMNS,)."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for at in range(start, end, ROWS):
        index = at + tl.arange(0, ROWS)
        token = tl.load(order + index, mask=index < end, other=0)
        mask = (index < end)[:, None] & (column < C)[None, :]
        total += tl.sum(tl.load(dy + token[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def _short_segments_kernel(
    dy,
    dw,
    partials,
    ids,
    order,
    offsets,
    N,
    V,
    C,
    dy_stride,
    dw_stride,
    TOKENS_PER_PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Short segments into their rows of dw (V, C), parts of long segments into partials (tiles, 2, C)."""
    blocks = tl.cdiv(C, COLUMNS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(N, TOKENS_PER_PARTIAL)
    # Parts of long segments come first, because they take longest.
    program = tl.program_id(0) // blocks - 2 * tiles
    if program >= 0:
        start, end = tl.load(offsets + program), tl.load(offsets + program + 1)
        if end - start <= TOKENS_PER_PARTIAL:
            total = _segment_sum(dy, order, start, end, column, dy_stride, C, ROWS, COLUMNS)
            tl.store(dw + program.to(tl.int64) * dw_stride + column, total.to(dw.dtype.element_ty), mask=column < C)
    else:
        tile, slot = (program + 2 * tiles) // 2, (program + 2 * tiles) % 2
        first = tile * TOKENS_PER_PARTIAL
        last = tl.minimum(first + TOKENS_PER_PARTIAL, N) - 1
        row = tl.load(ids + tl.where(slot == 0, first, last))
        start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        if (end - start > TOKENS_PER_PARTIAL) & ((slot == 0) | (start > first)):
            total = _segment_sum(dy, order, tl.maximum(start, first), tl.minimum(end, last + 1), column, dy_stride, C, ROWS, COLUMNS)
            tl.store(partials + (program + 2 * tiles).to(tl.int64) * C + column, total, mask=column < C)


@triton.jit
def _long_segments_kernel(
    dw, partials, ids, offsets, N, C, dw_stride, TOKENS_PER_PARTIAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """If a long segment begins in this tile: the sum of its parts into its row of dw."""
    blocks = tl.cdiv(C, COLUMNS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(0) // blocks
    first = tile * TOKENS_PER_PARTIAL
    row = tl.load(ids + tl.minimum(first + TOKENS_PER_PARTIAL, N) - 1)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    if (end - start > TOKENS_PER_PARTIAL) & (start >= first):
        slot = tl.where(start > first, 1, 0)
        total = tl.load(partials + (2 * tile + slot).to(tl.int64) * C + column, mask=column < C, other=0.0)
        for at in range(tile + 1, tl.cdiv(end, TOKENS_PER_PARTIAL), ROWS):
            index = at + tl.arange(0, ROWS)
            mask = (index < tl.cdiv(end, TOKENS_PER_PARTIAL))[:, None] & (column < C)[None, :]
            total += tl.sum(tl.load(partials + (2 * index[:, None]).to(tl.int64) * C + column[None, :], mask=mask, other=0.0), 0)
        tl.store(dw + row.to(tl.int64) * dw_stride + column, total.to(dw.dtype.element_ty), mask=column < C)


def embedding_weight_grad(
    ids: Tensor,
    dys: list[Tensor],
    rows: int,
    dtype: torch.dtype,
    tile: TileConfig | None = None,
    tokens_per_partial: int = TOKENS_PER_PARTIAL,
) -> Tensor:
    """Gradient (rows, C) in `dtype` of a table whose rows `ids` (N,) were read.

    dys: the output gradient, split by columns: (N, C_i) each, C columns in total. Sums are in float32 and in token order.
    """
    order_ids, order = ids.to(torch.int32).sort(stable=True)
    offsets = torch.searchsorted(order_ids, torch.arange(rows + 1, device=ids.device, dtype=torch.int32))
    widths = [dy.shape[1] for dy in dys]
    dw = ids.new_empty(rows, sum(widths), dtype=dtype)
    for columns, dy in zip(dw.split(widths, 1), dys, strict=True):
        _sum_segments(
            columns,
            dy if dy.stride(1) == 1 else dy.contiguous(),
            order_ids,
            order,
            offsets,
            tile or _tile_for(dy.shape[1]),
            tokens_per_partial,
        )
    return dw


def _sum_segments(dw: Tensor, dy: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, tile: TileConfig, tokens_per_partial: int) -> None:
    (N, C), V = dy.shape, dw.shape[0]
    blocks, tiles = triton.cdiv(C, tile.columns), triton.cdiv(N, tokens_per_partial)
    # Small compared with dy, and written only where there are long segments.
    partials = dy.new_empty(2 * tiles, C, dtype=torch.float32)
    shape = {"TOKENS_PER_PARTIAL": tokens_per_partial, "ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps}
    with torch.cuda.device_of(dy):
        _short_segments_kernel[((V + 2 * tiles) * blocks,)](
            dy, dw, partials, ids, order, offsets, N, V, C, dy.stride(0), dw.stride(0), **shape
        )
        if tiles:
            _long_segments_kernel[(tiles * blocks,)](dw, partials, ids, offsets, N, C, dw.stride(0), **shape)


def _tile_for(C: int) -> TileConfig:
    """The widest tile that wastes at most an eighth of its columns, with 16 bytes of 16-bit gradients per thread."""
    columns = DEFAULT_TILE.columns
    while columns > 256 and triton.cdiv(C, columns) * columns > 1.125 * C:
        columns //= 2
    return TileConfig(DEFAULT_TILE.rows, columns, max(1, columns * DEFAULT_TILE.warps // DEFAULT_TILE.columns))
