"""Triton kernels for the gradient of a table of vectors: the sum of the tokens' gradients for each row, without atomics.

The tokens are sorted by id, so that those of a row are a segment. A row's segment is summed by one program for each block
of columns, in the order of the tokens, and every row is written once, zeros included. Segments longer than PIECE tokens
would keep one program busy while the others are done: their parts are summed by a program each, a part being what lies in
one tile of PIECE sorted tokens, and a second kernel adds the parts up. A tile has parts of two long segments at most: that
of its first token and that of its last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How the work is cut."""

    columns: int
    """Of a program, a power of two."""
    rows: int
    """Tokens that a program reads at once, a power of two."""
    warps: int


LAUNCH = Launch(1024, 4, 4)
PIECE = 64
"""Tokens that one program sums at most."""


@triton.jit
def _sum(dy, order, start, end, column, stride, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of the gradients of sorted tokens start..end-1 in float32 (COLUMNS,)."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for at in range(start, end, ROWS):
        index = at + tl.arange(0, ROWS)
        token = tl.load(order + index, mask=index < end, other=0)
        mask = (index < end)[:, None] & (column < C)[None, :]
        total += tl.sum(tl.load(dy + token[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def _rows_and_parts(
    dy, dw, parts, ids, order, offsets, N, V, C, dy_stride, dw_stride, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows of short segments into dw (V, C), parts of long ones into parts (tiles, 2, C)."""
    blocks = tl.cdiv(C, COLUMNS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(N, PIECE)
    # The long segments come first: they take longest.
    job = tl.program_id(0) // blocks - 2 * tiles
    if job >= 0:
        start, end = tl.load(offsets + job), tl.load(offsets + job + 1)
        if end - start <= PIECE:
            total = _sum(dy, order, start, end, column, dy_stride, C, ROWS, COLUMNS)
            tl.store(dw + job.to(tl.int64) * dw_stride + column, total.to(dw.dtype.element_ty), mask=column < C)
    else:
        tile, slot = (job + 2 * tiles) // 2, (job + 2 * tiles) % 2
        first = tile * PIECE
        last = tl.minimum(first + PIECE, N) - 1
        row = tl.load(ids + tl.where(slot == 0, first, last))
        start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        if (end - start > PIECE) & ((slot == 0) | (start > first)):
            total = _sum(dy, order, tl.maximum(start, first), tl.minimum(end, last + 1), column, dy_stride, C, ROWS, COLUMNS)
            tl.store(parts + (job + 2 * tiles).to(tl.int64) * C + column, total, mask=column < C)


@triton.jit
def _long_rows(dw, parts, ids, offsets, N, C, dw_stride, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The long segment that begins in a tile, if one does: the sum of its parts into its row of dw."""
    blocks = tl.cdiv(C, COLUMNS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.program_id(0) // blocks
    first = tile * PIECE
    row = tl.load(ids + tl.minimum(first + PIECE, N) - 1)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    if (end - start > PIECE) & (start >= first):
        slot = tl.where(start > first, 1, 0)
        total = tl.load(parts + (2 * tile + slot).to(tl.int64) * C + column, mask=column < C, other=0.0)
        for at in range(tile + 1, tl.cdiv(end, PIECE), ROWS):
            index = at + tl.arange(0, ROWS)
            mask = (index < tl.cdiv(end, PIECE))[:, None] & (column < C)[None, :]
            total += tl.sum(tl.load(parts + (2 * index[:, None]).to(tl.int64) * C + column[None, :], mask=mask, other=0.0), 0)
        tl.store(dw + row.to(tl.int64) * dw_stride + column, total.to(dw.dtype.element_ty), mask=column < C)


def table_gradient(
    ids: Tensor, dys: list[Tensor], rows: int, dtype: torch.dtype, launch: Launch | None = None, piece: int = PIECE
) -> Tensor:
    """Gradient (rows, C) in `dtype` of a table whose rows `ids` (N,) were read; dys are the columns of dY, (N, C_i) each, C in all."""
    order_ids, order = ids.to(torch.int32).sort(stable=True)
    offsets = torch.searchsorted(order_ids, torch.arange(rows + 1, device=ids.device, dtype=torch.int32))
    widths = [dy.shape[1] for dy in dys]
    dw = ids.new_empty(rows, sum(widths), dtype=dtype)
    for columns, dy in zip(dw.split(widths, 1), dys, strict=True):
        _sum_into(columns, dy if dy.stride(1) == 1 else dy.contiguous(), order_ids, order, offsets, launch or _cut(dy.shape[1]), piece)
    return dw


def _sum_into(dw: Tensor, dy: Tensor, ids: Tensor, order: Tensor, offsets: Tensor, launch: Launch, piece: int) -> None:
    (N, C), V = dy.shape, dw.shape[0]
    blocks, tiles = triton.cdiv(C, launch.columns), triton.cdiv(N, piece)
    # Short of what a memory allocator notices, and written only where there are long segments.
    parts = dy.new_empty(2 * tiles, C, dtype=torch.float32)
    shape = {"PIECE": piece, "ROWS": launch.rows, "COLUMNS": launch.columns, "num_warps": launch.warps}
    with torch.cuda.device_of(dy):
        _rows_and_parts[((V + 2 * tiles) * blocks,)](dy, dw, parts, ids, order, offsets, N, V, C, dy.stride(0), dw.stride(0), **shape)
        if tiles:
            _long_rows[(tiles * blocks,)](dw, parts, ids, offsets, N, C, dw.stride(0), **shape)


def _cut(C: int) -> Launch:
    """Programs that leave few columns idle, with 16 bytes of 16-bit gradients for each thread."""
    columns = LAUNCH.columns
    while columns > 256 and triton.cdiv(C, columns) * columns > 1.125 * C:
        columns //= 2
    return Launch(columns, LAUNCH.rows, max(1, columns * LAUNCH.warps // LAUNCH.columns))
