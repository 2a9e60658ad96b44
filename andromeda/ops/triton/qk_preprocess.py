"""Triton kernels that preprocess queries and keys for attention: norm, learned scales, rotation and folded ALiBi in one pass.

A program computes a block of tokens and a few heads, of the queries or of the keys: it reads the tokens' cosines and sines once
and then each head once. The backward pass reads the projected vectors again and recomputes their norms, so that forward saves
nothing else. Where there are gradients of learned scales, a program processes several blocks of tokens of one head, a chunk,
and keeps the sums in registers until the end.

A head is read as D/2 pairs of columns; pairs that are not rotated get cosine 1 and sine 0. Shapes: n tokens of a block, P pairs,
rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.pdl import pdl_launch_dependents, pdl_launch_options, pdl_wait, supports_pdl

RMS_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
UNIT_EPS = tl.constexpr(1e-12)
"""The constants of `F.rms_norm` and `F.normalize`."""


TensorPair = tuple[Tensor, Tensor]
OptionalTensorPair = tuple[Tensor | None, Tensor | None]


class QKLaunchConfig(NamedTuple):
    """Work of one program."""

    tokens: int
    """Tokens of a program, a power of two."""
    heads: int
    """Heads of a program."""
    warps: int


FORWARD, BACKWARD, DECODE = QKLaunchConfig(32, 6, 4), QKLaunchConfig(32, 6, 4), QKLaunchConfig(4, 1, 1)
BACKWARD_SCALED = QKLaunchConfig(16, 1, 4)
"""The backward pass with learned scales has small blocks, because the sums take registers too."""
MAX_BLOCKS_PER_PROGRAM, MIN_PROGRAMS = 8, 64
"""Most blocks of a chunk, and how many chunks there must be before a chunk has more than one block."""
FEW_TOKENS = 1024
"""Up to this number of tokens a program has one head, so that they still occupy the whole GPU."""


class QKConstants(NamedTuple):
    """Values that are known when a kernel is compiled."""

    D: int
    """Columns of a head."""
    OUT: int
    """Columns of a head of the output: D, or D + 4 with folded ALiBi."""
    HALF: int
    """Rotated pairs."""
    P: int
    """Pairs of a head, rounded up to a power of two."""
    unit: int
    """A common divisor of all strides, from which the compiler knows how many columns it can load at once."""
    width: int
    """Contiguous pairs of one thread: as many as can be loaded at once everywhere, so that threads exchange nothing."""
    norm: str
    interleaved: bool
    tokens: int
    """Tokens of a program."""
    heads: int
    """Heads of a program."""
    pdl: bool = False
    """Launch with programmatic dependent launch."""


class HeadGroup(NamedTuple):
    """Arguments of the kernels for the queries or the keys; None where absent."""

    query: Any
    count: Any
    """Heads."""
    x: Any
    """Projected vectors (B, T, heads, D)."""
    x_b: Any
    """Batch stride in multiples of `QKConstants.unit`, like all strides below but those of heads."""
    x_t: Any
    x_h: Any
    """Head stride in elements."""
    y: Any
    """Preprocessed vectors (B, T, heads, OUT), or their gradient."""
    y_b: Any
    y_t: Any
    y_h: Any
    cos: Any
    sin: Any
    table_b: Any
    """Batch stride of the tables in rows, 0 where all sequences share them."""
    scale: Any
    """Learned scales (heads, 1) or (heads, D)."""
    per_dim: Any
    alibi_columns: Any = None
    """ALiBi slopes (heads,) of queries, position digits (T, OUT - D) or (B, T, OUT - D) of keys."""
    alibi_b: Any = 0
    """Batch stride of the digits in rows, 0 where all sequences share them."""
    dx: Any = None
    """Gradient of the projected vectors (B, T, heads, D)."""
    dx_b: Any = None
    dx_t: Any = None
    partial: Any = None
    """Partial sums of the gradient of the scales, one row per chunk."""
    partial_row: Any = None
    """Row stride of `partial`."""
    index: Any = None
    """Position () in y, then a cache, at which the only token is written."""


class TokenBlock(NamedTuple):
    """Batch index, time and validity of the tokens of a block, each (n,)."""

    batch: Any
    time: Any
    live: Any


@triton.jit
def _pair_indices(constants: tl.constexpr):
    """Indices of the pairs (P,), of which a thread holds `width` contiguous ones."""
    width: tl.constexpr = constants.width
    return tl.max_contiguous(tl.arange(0, constants.P), width)


@triton.jit
def _pair_columns(constants: tl.constexpr):
    """Columns of the first and the second element of each pair, each (P,)."""
    width: tl.constexpr = constants.width
    pair = tl.arange(0, constants.P)
    if constants.interleaved:
        first, second = 2 * pair, 2 * pair + 1
    else:
        # Plain sums where all pairs are rotated, which the compiler analyzes best.
        if 2 * constants.HALF == constants.D:
            first, second = pair, pair + constants.HALF
        else:
            first = tl.where(pair < constants.HALF, pair, pair + constants.HALF)
            second = tl.where(pair < constants.HALF, pair + constants.HALF, pair + constants.D // 2)
        first, second = tl.max_contiguous(first, width), tl.max_contiguous(second, width)
    return first, second


@triton.jit
def _pair_mask(live, constants: tl.constexpr):
    """Mask of the pairs of valid tokens (n, P)."""
    return live[:, None] & (tl.arange(0, constants.P) < constants.D // 2)[None, :]


@triton.jit
def _pair_pointers(rows, constants: tl.constexpr):
    """Pointers to interleaved pairs (n, P), each pair as one word: two strided loads would take twice as many instructions."""
    if rows.dtype.element_ty.primitive_bitwidth == 32:
        start = rows.to(tl.pointer_type(tl.uint64), bitcast=True)
    else:
        start = rows.to(tl.pointer_type(tl.uint32), bitcast=True)
    return start[:, None] + _pair_indices(constants)[None, :]


@triton.jit
def _load_pairs(rows, live, constants: tl.constexpr):
    """The vectors at `rows` (n,) in float32: first and second elements of the pairs, each (n, P), zero where masked."""
    mask = _pair_mask(live, constants)
    kind: tl.constexpr = rows.dtype.element_ty
    if constants.interleaved:
        word = tl.load(_pair_pointers(rows, constants), mask=mask, other=0)
        bits: tl.constexpr = tl.uint16 if kind.primitive_bitwidth == 16 else tl.uint32
        a = word.to(bits).to(kind, bitcast=True)
        b = (word >> kind.primitive_bitwidth).to(bits).to(kind, bitcast=True)
    else:
        first, second = _pair_columns(constants)
        a = tl.load(rows[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(rows[:, None] + second[None, :], mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(rows, live, a, b, constants: tl.constexpr):
    """The inverse of `_load_pairs`."""
    mask = _pair_mask(live, constants)
    kind: tl.constexpr = rows.dtype.element_ty
    if constants.interleaved:
        bits: tl.constexpr = tl.uint16 if kind.primitive_bitwidth == 16 else tl.uint32
        whole: tl.constexpr = tl.uint32 if kind.primitive_bitwidth == 16 else tl.uint64
        low = a.to(kind).to(bits, bitcast=True).to(whole)
        high = b.to(kind).to(bits, bitcast=True).to(whole)
        tl.store(_pair_pointers(rows, constants), low | (high << kind.primitive_bitwidth), mask=mask)
    else:
        first, second = _pair_columns(constants)
        tl.store(rows[:, None] + first[None, :], a.to(kind), mask=mask)
        tl.store(rows[:, None] + second[None, :], b.to(kind), mask=mask)


@triton.jit
def _load_angles(group, block, constants: tl.constexpr):
    """The tokens' cosines and sines (n, P)."""
    pair = tl.arange(0, constants.P)
    entry = (block.batch * group.table_b + block.time)[:, None] * constants.HALF + _pair_indices(constants)[None, :]
    mask = block.live[:, None] & (pair < constants.HALF)[None, :]
    return tl.load(group.cos + entry, mask=mask, other=1.0), tl.load(group.sin + entry, mask=mask, other=0.0)


@triton.jit
def _token_pointers(x, stride_b, stride_t, block, constants: tl.constexpr):
    """Pointers to the first head of each token (n,)."""
    return x + (block.batch.to(tl.int64) * stride_b + block.time.to(tl.int64) * stride_t) * constants.unit


@triton.jit
def _load_scales(group, head, constants: tl.constexpr):
    """A head's learned scales, broadcastable to (n, P), for the first and second elements of pairs."""
    if group.per_dim:
        first, second = _pair_columns(constants)
        exists = tl.arange(0, constants.P) < constants.D // 2
        row = group.scale + head * constants.D
        a = tl.load(row + first, mask=exists, other=0.0)[None, :]
        b = tl.load(row + second, mask=exists, other=0.0)[None, :]
    else:
        a = tl.load(group.scale + head)
        b = a
    return a, b


@triton.jit
def _store_scale_grad(group, chunk, head, a, b, constants: tl.constexpr):
    """Store a chunk's part of the gradient of a head's scales, summed over its tokens' parts a and b, each (n, P)."""
    row = group.partial + chunk * group.partial_row
    if group.per_dim:
        first, second = _pair_columns(constants)
        exists = tl.arange(0, constants.P) < constants.D // 2
        tl.store(row + head * constants.D + first, tl.sum(a, 0), mask=exists)
        tl.store(row + head * constants.D + second, tl.sum(b, 0), mask=exists)
    else:
        tl.store(row + head, tl.sum(tl.sum(a + b, 1), 0))


@triton.jit
def _norm_factors(a, b, constants: tl.constexpr):
    """The factor f (n, 1) of the norm, and w (n, 1) in its gradient dx = f (dn - w n <n, dn>)."""
    square = tl.sum(a * a + b * b, 1)[:, None]
    if constants.norm == "rms":
        f = 1.0 / tl.sqrt(square / constants.D + RMS_EPS)
        w = 1.0 / constants.D
    else:
        length = tl.sqrt(square)
        f = 1.0 / tl.maximum(length, UNIT_EPS)
        # Shorter vectors are divided by the constant UNIT_EPS.
        w = tl.where(length > UNIT_EPS, 1.0, 0.0)
    return f, w


@triton.jit
def _store_alibi_columns(rows, group, head, block, constants: tl.constexpr):
    """Store the additional columns of folded ALiBi."""
    column = tl.arange(0, constants.OUT - constants.D)
    if group.query:
        power = tl.where(column == 0, 65536.0, tl.where(column == 1, 256.0, tl.where(column == 2, 1.0, 0.0)))
        alibi_columns = power[None, :] * tl.load(group.alibi_columns + head).to(tl.float32)
    else:
        alibi_columns = tl.load(
            group.alibi_columns + (block.batch * group.alibi_b + block.time)[:, None] * (constants.OUT - constants.D) + column[None, :],
            mask=block.live[:, None],
            other=0,
        ).to(tl.float32)
    tl.store(rows[:, None] + constants.D + column[None, :], alibi_columns.to(rows.dtype.element_ty), mask=block.live[:, None])


@triton.jit
def _forward_heads(group, block, start, constants: tl.constexpr):
    """Forward pass of a program's heads, from head `start` on."""
    if constants.HALF > 0:
        cos, sin = _load_angles(group, block, constants)
    x, y = (
        _token_pointers(group.x, group.x_b, group.x_t, block, constants),
        _token_pointers(group.y, group.y_b, group.y_t, block, constants),
    )
    if group.index is not None:
        y += tl.load(group.index).to(tl.int64) * group.y_t * constants.unit
    for head in range(start, tl.minimum(start + constants.heads, group.count)):
        a, b = _load_pairs(x + head * group.x_h, block.live, constants)
        if constants.norm != "none":
            f, _ = _norm_factors(a, b, constants)
            a, b = a * f, b * f
        if group.scale is not None:
            s_a, s_b = _load_scales(group, head, constants)
            a, b = a * s_a, b * s_b
        if constants.HALF > 0:
            a, b = a * cos - b * sin, b * cos + a * sin
        _store_pairs(y + head * group.y_h, block.live, a, b, constants)
        if group.alibi_columns is not None:
            _store_alibi_columns(y + head * group.y_h, group, head, block, constants)


@triton.jit
def _backward_heads(group, chunk, first_head, N, T, blocks, constants: tl.constexpr):
    """Gradients of a program's heads for the blocks of a chunk, from `first_head` on, and the chunk's part of the scale gradients."""
    tl.static_assert(group.scale is None or constants.heads == 1, "the sums of scale gradients are of a single head")
    tokens: tl.constexpr = constants.tokens
    P: tl.constexpr = constants.P
    sum_a, sum_b = tl.zeros((tokens, P), tl.float32), tl.zeros((tokens, P), tl.float32)
    if group.scale is not None:
        s_a, s_b = _load_scales(group, first_head, constants)
    for block in range(chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(N, constants.tokens))):
        block = _token_block(block, N, T, constants)
        if constants.HALF > 0:
            cos, sin = _load_angles(group, block, constants)
        dy, dx = (
            _token_pointers(group.y, group.y_b, group.y_t, block, constants),
            _token_pointers(group.dx, group.dx_b, group.dx_t, block, constants),
        )
        for head in range(first_head, tl.minimum(first_head + constants.heads, group.count)):
            d_a, d_b = _load_pairs(dy + head * group.y_h, block.live, constants)
            if constants.HALF > 0:
                d_a, d_b = d_a * cos + d_b * sin, d_b * cos - d_a * sin
            if constants.norm != "none":
                a, b = _load_pairs(
                    _token_pointers(group.x, group.x_b, group.x_t, block, constants) + head * group.x_h, block.live, constants
                )
                f, w = _norm_factors(a, b, constants)
                a, b = a * f, b * f
                if group.scale is not None:
                    sum_a += a * d_a
                    sum_b += b * d_b
                    d_a, d_b = d_a * s_a, d_b * s_b
                along = w * tl.sum(a * d_a + b * d_b, 1)[:, None]
                d_a, d_b = f * (d_a - a * along), f * (d_b - b * along)
            _store_pairs(dx + head * constants.D, block.live, d_a, d_b, constants)
    if group.scale is not None:
        _store_scale_grad(group, chunk, first_head, sum_a, sum_b, constants)


@triton.jit
def _token_block(index, N, T, constants: tl.constexpr):
    """The tokens of block `index`."""
    token = index * constants.tokens + tl.arange(0, constants.tokens)
    batch = token // T
    return TokenBlock(batch, token - batch * T, token < N)


@triton.jit
def _program_position(q, k, constants: tl.constexpr):
    """Whether this program belongs to the queries, its first head, and the index of its block or chunk of tokens.

    Adjacent programs share tokens, so that the tables are read from the cache.
    """
    q_groups: tl.constexpr = (q.count + constants.heads - 1) // constants.heads
    groups: tl.constexpr = q_groups + (k.count + constants.heads - 1) // constants.heads
    index, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first = tl.where(group < q_groups, group, group - q_groups) * constants.heads
    return group < q_groups, first, index


@triton.jit
def _preprocess_qk_kernel(q, k, N, T, constants: tl.constexpr):
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    of_queries, first, index = _program_position(q, k, constants)
    block = _token_block(index, N, T, constants)
    if of_queries:
        _forward_heads(q, block, first, constants)
    else:
        _forward_heads(k, block, first, constants)


@triton.jit
def _preprocess_qk_backward_kernel(q, k, N, T, blocks, constants: tl.constexpr):
    of_queries, first, chunk = _program_position(q, k, constants)
    if of_queries:
        _backward_heads(q, chunk, first, N, T, blocks, constants)
    else:
        _backward_heads(k, chunk, first, N, T, blocks, constants)


def preprocess_qk(
    xs: TensorPair,
    scales: OptionalTensorPair,
    tables: list[Tensor],
    alibi: list[Tensor],
    norm: str,
    layout: str,
    config: QKLaunchConfig | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
) -> TensorPair:
    """Queries (B, T, H, OUT) and keys (B, T, G, OUT) from projected ones with D columns.

    The other arguments are those of `andromeda.ops.qk_preprocess.QKPreprocessSpec`. cache: keys (B, S, G, OUT) into which the
    new keys are written (T = 1), and the index () at which.
    """
    N, T = _token_counts(xs[0])
    D = xs[0].shape[-1]
    config = config or (DECODE if N <= FEW_TOKENS else FORWARD)
    out = D + (alibi[1].shape[-1] if alibi else 0)
    keys, index = cache or (xs[1].new_empty(*xs[1].shape[:-1], out), None)
    ys = [xs[0].new_empty(*xs[0].shape[:-1], out), keys]
    xs = _make_readable(xs, layout)
    constants = _constants(D, out, [*xs, *ys], tables, norm, layout, config)._replace(pdl=cache is not None and supports_pdl(xs[0]))
    q, k = (
        _head_group(constants, query, x, y, scale, tables)._replace(alibi_columns=columns, alibi_b=_digits_stride(columns))
        for query, x, y, scale, columns in zip(_QUERY, xs, ys, scales, alibi or (None, None), strict=True)
    )
    _launch_kernel(_preprocess_qk_kernel, (q, k._replace(index=index), N, T), triton.cdiv(N, config.tokens), constants, config)
    return ys[0], ys[1]


def preprocess_qk_backward(
    dys: TensorPair,
    raw: Sequence[Tensor],
    scales: OptionalTensorPair,
    tables: list[Tensor],
    norm: str,
    layout: str,
    dxs: TensorPair,
    config: QKLaunchConfig | None = None,
) -> list[Tensor]:
    """Compute the gradients dxs of projected queries (B, T, H, D) and keys (B, T, G, D); return those of the scales that are given.

    dys: gradients of the outputs. raw: projected queries and keys; empty without a norm. dxs may be views of a wider tensor whose
    heads are contiguous.
    """
    D = dxs[0].shape[-1]
    N, T = _token_counts(dys[0])
    scaled = any(s is not None for s in scales)
    config = config or (BACKWARD_SCALED if scaled else BACKWARD)
    blocks = min(MAX_BLOCKS_PER_PROGRAM, max(1, N // (MIN_PROGRAMS * config.tokens))) if scaled else 1
    chunks = triton.cdiv(N, blocks * config.tokens)
    sizes = [0 if s is None else s.numel() for s in scales]
    partial = dys[0].new_empty(chunks, sum(sizes), dtype=torch.float32)
    dys = _make_readable(dys, layout)
    xs = _make_readable((raw[0], raw[1]), layout) if raw else dys
    outputs = [dx if _is_readable(dx, layout) else dx.new_empty(dx.shape) for dx in dxs]
    constants = _constants(D, D, [*xs, *dys, *outputs], tables, norm, layout, config)
    q, k = (
        _head_group(constants, query, x, dy, scale, tables)._replace(
            dx=dx, dx_b=_stride_in_units(dx, 0, constants), dx_t=_stride_in_units(dx, 1, constants), partial=part, partial_row=sum(sizes)
        )
        for query, x, dy, scale, dx, part in zip(_QUERY, xs, dys, scales, outputs, partial.split(sizes, 1), strict=True)
    )
    _launch_kernel(_preprocess_qk_backward_kernel, (q, k, N, T, blocks), chunks, constants, config)
    for dx, of in zip(dxs, outputs, strict=True):
        if of is not dx:
            dx.copy_(of)
    # Summed in one fixed order, so that the gradients are deterministic, and in one pass for both scales.
    sums = zip(partial.sum(0).split(sizes), scales, strict=True) if scaled else ()
    return [of.view_as(s).to(s.dtype, copy=True) for of, s in sums if s is not None]


_QUERY = (True, False)


def _head_group(constants: QKConstants, query: bool, x: Tensor, y: Tensor, scale: Tensor | None, tables: list[Tensor]) -> HeadGroup:
    cos, sin = [t.contiguous() for t in (tables[:2] if query else tables[2:])] or (None, None)
    return HeadGroup(
        tl.constexpr(query),
        tl.constexpr(y.shape[2]),
        *(x, _stride_in_units(x, 0, constants), _stride_in_units(x, 1, constants), tl.constexpr(x.stride(2))),
        *(y, _stride_in_units(y, 0, constants), _stride_in_units(y, 1, constants), tl.constexpr(y.stride(2))),
        cos,
        sin,
        0 if cos is None or cos.shape[0] == 1 else cos.shape[1],
        None if scale is None else scale.contiguous(),
        tl.constexpr(scale is not None and scale.shape[-1] > 1),
    )


def _digits_stride(columns: Tensor | None) -> int:
    return columns.shape[1] if columns is not None and columns.ndim == 3 else 0


def _stride_in_units(x: Tensor, dim: int, constants: QKConstants) -> int:
    return x.stride(dim) // constants.unit


def _make_readable(xs: TensorPair, layout: str) -> TensorPair:
    """xs, or contiguous copies of those that the kernels cannot read."""
    q, k = (x if _is_readable(x, layout) else x.contiguous() for x in xs)
    return q, k


def _is_readable(x: Tensor, layout: str) -> bool:
    """Whether the columns of x's heads are contiguous and, if interleaved, every pair is aligned to be read as one word."""
    odd = layout == "interleaved" and any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1]))
    return x.stride(-1) == 1 and not odd


def _constants(
    D: int, out: int, tensors: list[Tensor], tables: list[Tensor], norm: str, layout: str, config: QKLaunchConfig
) -> QKConstants:
    half = tables[0].shape[-1] if tables else 0
    interleaved = layout == "interleaved"
    unit = gcd(16, *(step for x in tensors for step in x.stride()[:-1]))
    # Interleaved pairs are contiguous across the end of the rotated ones; halves are not.
    width = gcd(unit // 2, D // 2) if interleaved else gcd(unit, half, D // 2)
    return QKConstants(D, out, half, triton.next_power_of_2(D // 2), unit, width, norm, interleaved, config.tokens, config.heads)


def _token_counts(x: Tensor) -> tuple[int, int]:
    """Tokens of x (B, T, ...): in total, and per sequence."""
    return x.shape[0] * x.shape[1], x.shape[1]


def _launch_kernel(kernel: Any, arguments: tuple[Any, ...], indices: int, constants: QKConstants, config: QKLaunchConfig) -> None:
    """Launch a program for every group of query heads and of key heads and each of `indices` blocks or chunks.

    arguments: those of the kernel, beginning with the two HeadGroups.
    """
    q, k = arguments[:2]
    groups = triton.cdiv(q.count.value, config.heads) + triton.cdiv(k.count.value, config.heads)
    with torch.cuda.device_of(q.x):
        kernel[(indices * groups,)](*arguments, constants, num_warps=config.warps, **pdl_launch_options(constants.pdl))
