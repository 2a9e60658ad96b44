"""Triton kernels that prepare queries and keys for attention: norm, learned scales, rotation and folded ALiBi in one pass.

A program takes a block of tokens and a few heads, of the queries or of the keys: it reads the tokens' angles once and then
each head once. The backward pass reads the raw vectors again and computes their norms anew, so that forward saves nothing.
Where it has gradients of learned scales, a program walks over several blocks of tokens of one head instead, and their sums
stay in registers until the end.

A head is read as D/2 pairs of columns; those that rotary leaves alone are pairs that turn by nothing. Shapes: n tokens of a
block, P pairs, rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.pdl import begin, early, options, wait

RMS_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
UNIT_EPS = tl.constexpr(1e-12)
"""The constants of `F.rms_norm` and `F.normalize`."""


Pair = tuple[Tensor, Tensor]
Maybe = tuple[Tensor | None, Tensor | None]


class Launch(NamedTuple):
    """How the work is cut."""

    tokens: int
    """Tokens of a program, a power of two."""
    heads: int
    """Heads of a program."""
    warps: int


FORWARD, BACKWARD, DECODE = Launch(32, 6, 4), Launch(32, 6, 4), Launch(4, 1, 1)
SCALED = Launch(16, 1, 4)
"""Of the backward pass with learned scales: small blocks, since the sums take registers too."""
WALK, WALKS = 8, 64
"""Most blocks that one of its programs walks over, and as many walks as there must be before they grow longer than one block."""
FEW_TOKENS = 1024
"""Up to here a program has one head, so that few tokens still occupy the whole GPU."""


class Shape(NamedTuple):
    """What is known when a kernel is compiled."""

    D: int
    """Columns of a head."""
    OUT: int
    """The same with those of a folded ALiBi."""
    HALF: int
    """Pairs that turn."""
    P: int
    unit: int
    """Divides all strides, so that the compiler knows how many columns it may read at once."""
    width: int
    """Pairs of one thread that lie side by side: as many as can be read at once everywhere, so that threads exchange nothing."""
    norm: str
    interleaved: bool
    tokens: int
    """Tokens of a program."""
    heads: int
    """Heads of a program."""
    early: bool = False


class Side(NamedTuple):
    """The queries or the keys, as the kernels see them; None where there is nothing."""

    query: Any
    count: Any
    """Heads."""
    x: Any
    """Raw vectors (B, T, heads, D)."""
    x_b: Any
    """Stride of batch, as a multiple of the shape's unit."""
    x_t: Any
    x_h: Any
    """Stride of the heads in full."""
    y: Any
    """Prepared vectors (B, T, heads, OUT), or their gradient."""
    y_b: Any
    y_t: Any
    y_h: Any
    cos: Any
    sin: Any
    table_b: Any
    """Rows of the tables from one sequence to the next, 0 where all share them."""
    scale: Any
    """Learned scales (heads, 1) or (heads, D)."""
    per_dim: Any
    tail: Any = None
    """Slopes (heads,) of queries, digits (T, OUT - D) of keys."""
    dx: Any = None
    """Gradient of the raw vectors (B, T, heads, D)."""
    dx_b: Any = None
    dx_t: Any = None
    partial: Any = None
    """Gradient of the scales, a row for each walk over blocks of tokens."""
    partial_row: Any = None
    """Numbers from one of its rows to the next."""
    place: Any = None
    """Where in y, a cache, the one token of a pass belongs: a number () on the device."""


class Block(NamedTuple):
    """The tokens of a block, each (n,)."""

    batch: Any
    time: Any
    live: Any


@triton.jit
def _pairs(shape: tl.constexpr):
    """Numbers of the pairs (P,), of which a thread takes `shape.width` side by side."""
    width: tl.constexpr = shape.width
    return tl.max_contiguous(tl.arange(0, shape.P), width)


@triton.jit
def _columns(shape: tl.constexpr):
    """Columns of the first and the second of each pair, each (P,)."""
    width: tl.constexpr = shape.width
    pair = tl.arange(0, shape.P)
    if shape.interleaved:
        first, second = 2 * pair, 2 * pair + 1
    else:
        # Plain sums where all pairs turn, which the compiler sees through best.
        if 2 * shape.HALF == shape.D:
            first, second = pair, pair + shape.HALF
        else:
            first = tl.where(pair < shape.HALF, pair, pair + shape.HALF)
            second = tl.where(pair < shape.HALF, pair + shape.HALF, pair + shape.D // 2)
        first, second = tl.max_contiguous(first, width), tl.max_contiguous(second, width)
    return first, second


@triton.jit
def _exists(live, shape: tl.constexpr):
    """Which pairs of the tokens there are (n, P)."""
    return live[:, None] & (tl.arange(0, shape.P) < shape.D // 2)[None, :]


@triton.jit
def _words(rows, shape: tl.constexpr):
    """Where interleaved pairs lie (n, P), each pair as one number: two reads with gaps would be twice as many instructions."""
    if rows.dtype.element_ty.primitive_bitwidth == 32:
        start = rows.to(tl.pointer_type(tl.uint64), bitcast=True)
    else:
        start = rows.to(tl.pointer_type(tl.uint32), bitcast=True)
    return start[:, None] + _pairs(shape)[None, :]


@triton.jit
def _load(rows, live, shape: tl.constexpr):
    """The vectors at `rows` (n,) in float32: firsts and seconds of pairs, each (n, P), zero where there are none."""
    mask = _exists(live, shape)
    kind: tl.constexpr = rows.dtype.element_ty
    if shape.interleaved:
        word = tl.load(_words(rows, shape), mask=mask, other=0)
        bits: tl.constexpr = tl.uint16 if kind.primitive_bitwidth == 16 else tl.uint32
        a = word.to(bits).to(kind, bitcast=True)
        b = (word >> kind.primitive_bitwidth).to(bits).to(kind, bitcast=True)
    else:
        first, second = _columns(shape)
        a = tl.load(rows[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(rows[:, None] + second[None, :], mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store(rows, live, a, b, shape: tl.constexpr):
    """The opposite of `_load`."""
    mask = _exists(live, shape)
    kind: tl.constexpr = rows.dtype.element_ty
    if shape.interleaved:
        bits: tl.constexpr = tl.uint16 if kind.primitive_bitwidth == 16 else tl.uint32
        whole: tl.constexpr = tl.uint32 if kind.primitive_bitwidth == 16 else tl.uint64
        low = a.to(kind).to(bits, bitcast=True).to(whole)
        high = b.to(kind).to(bits, bitcast=True).to(whole)
        tl.store(_words(rows, shape), low | (high << kind.primitive_bitwidth), mask=mask)
    else:
        first, second = _columns(shape)
        tl.store(rows[:, None] + first[None, :], a.to(kind), mask=mask)
        tl.store(rows[:, None] + second[None, :], b.to(kind), mask=mask)


@triton.jit
def _angles(side, at, shape: tl.constexpr):
    """The tokens' cosines and sines (n, P)."""
    pair = tl.arange(0, shape.P)
    entry = (at.batch * side.table_b + at.time)[:, None] * shape.HALF + _pairs(shape)[None, :]
    mask = at.live[:, None] & (pair < shape.HALF)[None, :]
    return tl.load(side.cos + entry, mask=mask, other=1.0), tl.load(side.sin + entry, mask=mask, other=0.0)


@triton.jit
def _rows(x, stride_b, stride_t, at, shape: tl.constexpr):
    """Where the tokens' first heads lie (n,)."""
    return x + (at.batch.to(tl.int64) * stride_b + at.time.to(tl.int64) * stride_t) * shape.unit


@triton.jit
def _scales(side, head, shape: tl.constexpr):
    """A head's learned scales, to be multiplied with (n, P) and (n, P)."""
    if side.per_dim:
        first, second = _columns(shape)
        exists = tl.arange(0, shape.P) < shape.D // 2
        row = side.scale + head * shape.D
        a = tl.load(row + first, mask=exists, other=0.0)[None, :]
        b = tl.load(row + second, mask=exists, other=0.0)[None, :]
    else:
        a = tl.load(side.scale + head)
        b = a
    return a, b


@triton.jit
def _store_scale_gradient(side, walk, head, a, b, shape: tl.constexpr):
    """A walk's share in the gradient of a head's scales, summed from the shares a and b of its tokens, each (n, P)."""
    row = side.partial + walk * side.partial_row
    if side.per_dim:
        first, second = _columns(shape)
        exists = tl.arange(0, shape.P) < shape.D // 2
        tl.store(row + head * shape.D + first, tl.sum(a, 0), mask=exists)
        tl.store(row + head * shape.D + second, tl.sum(b, 0), mask=exists)
    else:
        tl.store(row + head, tl.sum(tl.sum(a + b, 1), 0))


@triton.jit
def _norm(a, b, shape: tl.constexpr):
    """f (n, 1), by which the vectors are multiplied, and w (n, 1) in its gradient dx = f (dn - w n <n, dn>)."""
    square = tl.sum(a * a + b * b, 1)[:, None]
    if shape.norm == "rms":
        f = 1.0 / tl.sqrt(square / shape.D + RMS_EPS)
        w = 1.0 / shape.D
    else:
        length = tl.sqrt(square)
        f = 1.0 / tl.maximum(length, UNIT_EPS)
        # Shorter vectors are divided by a constant.
        w = tl.where(length > UNIT_EPS, 1.0, 0.0)
    return f, w


@triton.jit
def _store_bias(rows, side, head, at, shape: tl.constexpr):
    """The columns of a folded ALiBi."""
    column = tl.arange(0, shape.OUT - shape.D)
    if side.query:
        power = tl.where(column == 0, 65536.0, tl.where(column == 1, 256.0, tl.where(column == 2, 1.0, 0.0)))
        tail = power[None, :] * tl.load(side.tail + head).to(tl.float32)
    else:
        tail = tl.load(side.tail + at.time[:, None] * (shape.OUT - shape.D) + column[None, :], mask=at.live[:, None], other=0).to(
            tl.float32
        )
    tl.store(rows[:, None] + shape.D + column[None, :], tail.to(rows.dtype.element_ty), mask=at.live[:, None])


@triton.jit
def _forward_side(side, at, start, shape: tl.constexpr):
    """Some heads of a block of tokens, from head `start` on."""
    if shape.HALF > 0:
        cos, sin = _angles(side, at, shape)
    x, y = _rows(side.x, side.x_b, side.x_t, at, shape), _rows(side.y, side.y_b, side.y_t, at, shape)
    if side.place is not None:
        y += tl.load(side.place).to(tl.int64) * side.y_t * shape.unit
    for head in range(start, tl.minimum(start + shape.heads, side.count)):
        a, b = _load(x + head * side.x_h, at.live, shape)
        if shape.norm != "none":
            f, _ = _norm(a, b, shape)
            a, b = a * f, b * f
        if side.scale is not None:
            s_a, s_b = _scales(side, head, shape)
            a, b = a * s_a, b * s_b
        if shape.HALF > 0:
            a, b = a * cos - b * sin, b * cos + a * sin
        _store(y + head * side.y_h, at.live, a, b, shape)
        if side.tail is not None:
            _store_bias(y + head * side.y_h, side, head, at, shape)


@triton.jit
def _backward_side(side, walk, begin, N, T, blocks, shape: tl.constexpr):
    """Gradients of some heads of the blocks of a walk, from head `begin` on, and the walk's share of those of the scales."""
    tl.static_assert(side.scale is None or shape.heads == 1, "the sums are of one head")
    tokens: tl.constexpr = shape.tokens
    P: tl.constexpr = shape.P
    sum_a, sum_b = tl.zeros((tokens, P), tl.float32), tl.zeros((tokens, P), tl.float32)
    if side.scale is not None:
        s_a, s_b = _scales(side, begin, shape)
    for block in range(walk * blocks, tl.minimum((walk + 1) * blocks, tl.cdiv(N, shape.tokens))):
        at = _block(block, N, T, shape)
        if shape.HALF > 0:
            cos, sin = _angles(side, at, shape)
        dy, dx = _rows(side.y, side.y_b, side.y_t, at, shape), _rows(side.dx, side.dx_b, side.dx_t, at, shape)
        for head in range(begin, tl.minimum(begin + shape.heads, side.count)):
            d_a, d_b = _load(dy + head * side.y_h, at.live, shape)
            if shape.HALF > 0:
                d_a, d_b = d_a * cos + d_b * sin, d_b * cos - d_a * sin
            if shape.norm != "none":
                a, b = _load(_rows(side.x, side.x_b, side.x_t, at, shape) + head * side.x_h, at.live, shape)
                f, w = _norm(a, b, shape)
                a, b = a * f, b * f
                if side.scale is not None:
                    sum_a += a * d_a
                    sum_b += b * d_b
                    d_a, d_b = d_a * s_a, d_b * s_b
                along = w * tl.sum(a * d_a + b * d_b, 1)[:, None]
                d_a, d_b = f * (d_a - a * along), f * (d_b - b * along)
            _store(dx + head * shape.D, at.live, d_a, d_b, shape)
    if side.scale is not None:
        _store_scale_gradient(side, walk, begin, sum_a, sum_b, shape)


@triton.jit
def _block(index, N, T, shape: tl.constexpr):
    """The tokens of a block."""
    token = index * shape.tokens + tl.arange(0, shape.tokens)
    batch = token // T
    return Block(batch, token - batch * T, token < N)


@triton.jit
def _program(q, k, shape: tl.constexpr):
    """Whether this program is of the queries, its first head and the number of its tokens' block or walk.

    Neighbors share tokens, whose tables are cached then.
    """
    q_groups: tl.constexpr = (q.count + shape.heads - 1) // shape.heads
    groups: tl.constexpr = q_groups + (k.count + shape.heads - 1) // shape.heads
    index, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first = tl.where(group < q_groups, group, group - q_groups) * shape.heads
    return group < q_groups, first, index


@triton.jit
def _forward(q, k, N, T, shape: tl.constexpr):
    begin(shape)
    wait(shape)
    of_queries, first, index = _program(q, k, shape)
    at = _block(index, N, T, shape)
    if of_queries:
        _forward_side(q, at, first, shape)
    else:
        _forward_side(k, at, first, shape)


@triton.jit
def _backward(q, k, N, T, blocks, shape: tl.constexpr):
    of_queries, first, walk = _program(q, k, shape)
    if of_queries:
        _backward_side(q, walk, first, N, T, blocks, shape)
    else:
        _backward_side(k, walk, first, N, T, blocks, shape)


def forward(
    xs: Pair,
    scales: Maybe,
    tables: list[Tensor],
    tails: list[Tensor],
    norm: str,
    layout: str,
    launch: Launch | None = None,
    place: tuple[Tensor, Tensor] | None = None,
) -> Pair:
    """Prepared queries (B, T, H, OUT) and keys (B, T, G, OUT) of raw ones with D columns.
    Arguments as in `andromeda.ops.qk_preprocess.Form`.

    place: a cache (B, S, G, OUT) that takes the keys of one token each, and an index () in it.
    """
    N, T = _tokens(xs[0])
    D = xs[0].shape[-1]
    launch = launch or (DECODE if N <= FEW_TOKENS else FORWARD)
    out = D + (tails[1].shape[-1] if tails else 0)
    cache, index = place or (xs[1].new_empty(*xs[1].shape[:-1], out), None)
    ys = [xs[0].new_empty(*xs[0].shape[:-1], out), cache]
    xs = _readable(xs, layout)
    shape = _shape(D, out, [*xs, *ys], tables, norm, layout, launch)._replace(early=place is not None and early(xs[0]))
    q, k = (
        _side(shape, query, x, y, scale, tables)._replace(tail=tail)
        for query, x, y, scale, tail in zip(_QUERY, xs, ys, scales, tails or (None, None), strict=True)
    )
    _launch(_forward, (q, k._replace(place=index), N, T), triton.cdiv(N, launch.tokens), shape, launch)
    return ys[0], ys[1]


def backward(
    dys: Pair,
    raw: Sequence[Tensor],
    scales: Maybe,
    tables: list[Tensor],
    norm: str,
    layout: str,
    dxs: Pair,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Fill dxs, the gradients of raw queries (B, T, H, D) and keys (B, T, G, D), and return those of the scales that there are.

    dys: the gradients of the prepared ones. `raw` may be missing where nothing is normed. dxs may be views of a wider tensor, as
    long as heads lie side by side.
    """
    D = dxs[0].shape[-1]
    N, T = _tokens(dys[0])
    scaled = any(s is not None for s in scales)
    launch = launch or (SCALED if scaled else BACKWARD)
    blocks = min(WALK, max(1, N // (WALKS * launch.tokens))) if scaled else 1
    walks = triton.cdiv(N, blocks * launch.tokens)
    sizes = [0 if s is None else s.numel() for s in scales]
    partial = dys[0].new_empty(walks, sum(sizes), dtype=torch.float32)
    dys = _readable(dys, layout)
    xs = _readable((raw[0], raw[1]), layout) if raw else dys
    made = [dx if _whole(dx, layout) else dx.new_empty(dx.shape) for dx in dxs]
    shape = _shape(D, D, [*xs, *dys, *made], tables, norm, layout, launch)
    q, k = (
        _side(shape, query, x, dy, scale, tables)._replace(
            dx=dx, dx_b=_units(dx, 0, shape), dx_t=_units(dx, 1, shape), partial=part, partial_row=sum(sizes)
        )
        for query, x, dy, scale, dx, part in zip(_QUERY, xs, dys, scales, made, partial.split(sizes, 1), strict=True)
    )
    _launch(_backward, (q, k, N, T, blocks), walks, shape, launch)
    for dx, of in zip(dxs, made, strict=True):
        if of is not dx:
            dx.copy_(of)
    # One order of summation, whatever the order in which the programs ran, and one pass for both scales.
    sums = zip(partial.sum(0).split(sizes), scales, strict=True) if scaled else ()
    return [of.view_as(s).to(s.dtype, copy=True) for of, s in sums if s is not None]


_QUERY = (True, False)


def _side(shape: Shape, query: bool, x: Tensor, y: Tensor, scale: Tensor | None, tables: list[Tensor]) -> Side:
    cos, sin = [t.contiguous() for t in (tables[:2] if query else tables[2:])] or (None, None)
    return Side(
        tl.constexpr(query),
        tl.constexpr(y.shape[2]),
        *(x, _units(x, 0, shape), _units(x, 1, shape), tl.constexpr(x.stride(2))),
        *(y, _units(y, 0, shape), _units(y, 1, shape), tl.constexpr(y.stride(2))),
        cos,
        sin,
        0 if cos is None or cos.shape[0] == 1 else cos.shape[1],
        None if scale is None else scale.contiguous(),
        tl.constexpr(scale is not None and scale.shape[-1] > 1),
    )


def _units(x: Tensor, dim: int, shape: Shape) -> int:
    return x.stride(dim) // shape.unit


def _readable(xs: Pair, layout: str) -> Pair:
    """xs, or copies of what the kernels cannot read."""
    q, k = (x if _whole(x, layout) else x.contiguous() for x in xs)
    return q, k


def _whole(x: Tensor, layout: str) -> bool:
    """Whether the columns of x's heads lie side by side and, if interleaved, every pair where it is read as one number."""
    odd = layout == "interleaved" and any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1]))
    return x.stride(-1) == 1 and not odd


def _shape(D: int, out: int, tensors: list[Tensor], tables: list[Tensor], norm: str, layout: str, launch: Launch) -> Shape:
    half = tables[0].shape[-1] if tables else 0
    interleaved = layout == "interleaved"
    unit = gcd(16, *(step for x in tensors for step in x.stride()[:-1]))
    # Interleaved pairs lie side by side also where the turned ones end; of halves, neighbors end there.
    width = gcd(unit // 2, D // 2) if interleaved else gcd(unit, half, D // 2)
    return Shape(D, out, half, triton.next_power_of_2(D // 2), unit, width, norm, interleaved, launch.tokens, launch.heads)


def _tokens(x: Tensor) -> tuple[int, int]:
    """Tokens of x (B, T, ...), in all and in a sequence."""
    return x.shape[0] * x.shape[1], x.shape[1]


def _launch(kernel: Any, given: tuple[Any, ...], indices: int, shape: Shape, launch: Launch) -> None:
    """Programs for every group of heads of both sides, which `given` begins with, and each of `indices` blocks or walks."""
    q, k = given[:2]
    groups = triton.cdiv(q.count.value, launch.heads) + triton.cdiv(k.count.value, launch.heads)
    with torch.cuda.device_of(q.x):
        kernel[(indices * groups,)](*given, shape, num_warps=launch.warps, **options(shape.early))
