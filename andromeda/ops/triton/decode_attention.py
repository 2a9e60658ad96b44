"""Triton kernels for attention of one query: one takes the keys in parts, two for each multiprocessor, one puts the parts together.

A program takes a part of the keys of one sequence and one key/value head, and all query heads that read it, so that keys and
values are read once (Flash-Decoding, arXiv 2311.01282). It keeps the running largest logit and sum of FlashAttention
(arXiv 2205.14135); a second kernel weighs the parts by them. Which keys are seen is known on the device alone: programs whose
part lies outside the window, or behind the query, read nothing.

Shapes: B sequences, S keys, H query heads, G key/value heads, R = H / G, D and Dv dimensions of a head, P parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.pdl import begin, early, options, wait


class Launch(NamedTuple):
    """How the work is cut."""

    keys: int
    """That a program reads at once, a power of two from 16 on."""
    programs: int
    """That there are in all, about."""
    warps: int


LAUNCH = Launch(32, 264, 4)
"""Two programs for nearly each of a large GPU's 132 multiprocessors: while one computes, the other's keys and values come."""
TAIL = 8
"""Most columns of a head behind a power of two that are added one by one, such as those of a folded ALiBi."""
COLUMNS = 16
"""Dimensions of a head that a program of the second kernel puts together."""


@triton.jit
def _logits(logits, position, first, last, heads, document, numbers, slopes, scale, softcap, end, pattern: tl.constexpr):
    """Logits (r, n) of a block of keys from their products, minus infinity where one is not seen."""
    logits *= scale
    if pattern.softcap:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    if pattern.slopes:
        logits -= tl.load(slopes + heads).to(tl.float32)[:, None] * (last - position).to(tl.float32)[None, :]
    seen = (position >= first) & (position <= last) & (position < end)
    if pattern.documents:
        seen = seen & (tl.load(numbers + position, mask=seen, other=0) == document)
    return tl.where(seen[None, :], logits, float("-inf"))


@triton.jit
def _parts(
    q, k, v, own, numbers, slopes, index, total, peak, out, S, length, scale, softcap, window,
    q_b, k_b, v_b, own_b, numbers_b, pattern: tl.constexpr,
):  # fmt: skip
    """One part: its weighted values (B, G, P, R, Dv) over its own largest logit, with that and the sum of exponentials (B, G, P, R)."""
    begin(pattern)
    wait(pattern)
    pair, part = tl.program_id(0), tl.program_id(1)
    b, g = (pair // pattern.G).to(tl.int64), pair % pattern.G
    row, d, dv = tl.arange(0, pattern.ROWS), tl.arange(0, pattern.WIDE), tl.arange(0, pattern.WIDE_V)
    heads = g * pattern.R + tl.minimum(row, pattern.R - 1)
    q += b * q_b
    queries = tl.load(q + heads[:, None] * pattern.q_h + d[None, :], mask=(d < pattern.D)[None, :], other=0.0)
    last = tl.load(index).to(tl.int32) if pattern.placed else S - 1
    first = tl.maximum(last + 1 - window, 0) if pattern.window else 0
    document = tl.load(own + b * own_b) if pattern.documents else 0
    from_key = part * length
    end = tl.minimum(from_key + length, S)
    m = tl.full((pattern.ROWS,), float("-inf"), tl.float32)
    s = tl.full((pattern.ROWS,), 0.0, tl.float32)
    sums = tl.full((pattern.ROWS, pattern.WIDE_V), 0.0, tl.float32)
    # Blocks before the window and behind the query are passed over; from_key and the window's start lie on no common grid.
    start = from_key + tl.maximum(first - from_key, 0) // pattern.KEYS * pattern.KEYS
    for at in range(start, tl.minimum(end, last + 1), pattern.KEYS):
        position = at + tl.arange(0, pattern.KEYS)
        live = position < end
        where = position.to(tl.int64)
        rows = k + b * k_b + g * pattern.k_g + where * pattern.k_s
        keys = tl.load(rows[None, :] + d[:, None], mask=live[None, :] & (d < pattern.D)[:, None], other=0.0)
        values = tl.load(
            v + b * v_b + g * pattern.v_g + where[:, None] * pattern.v_s + dv[None, :],
            mask=live[:, None] & (dv < pattern.DV)[None, :],
            other=0.0,
        )
        products = tl.dot(queries, keys, input_precision="ieee")
        for column in tl.static_range(tl.constexpr(pattern.WIDE), tl.constexpr(pattern.D)):
            query = tl.load(q + heads * pattern.q_h + column).to(tl.float32)
            products += query[:, None] * tl.load(rows + column, mask=live, other=0.0).to(tl.float32)[None, :]
        logits = _logits(products, position, first, last, heads, document, numbers + b * numbers_b, slopes, scale, softcap, end, pattern)
        above = tl.maximum(m, tl.max(logits, 1))
        # Where nothing is seen yet, minus infinity stands on both sides.
        safe = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp(logits - safe[:, None])
        fade = tl.exp(m - safe)
        s = s * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        m = above
    at = ((pair * tl.num_programs(1) + part) * pattern.R + row).to(tl.int64)
    tl.store(peak + at, m, mask=row < pattern.R)
    tl.store(total + at, s, mask=row < pattern.R)
    tl.store(out + at[:, None] * pattern.DV + dv[None, :], sums, mask=(row < pattern.R)[:, None] & (dv < pattern.DV)[None, :])


@triton.jit
def _together(total, peak, parts, out, P, pattern: tl.constexpr):
    """Some columns of one head's average (B, H, Dv), from its parts."""
    begin(pattern)
    wait(pattern)
    head, column = tl.program_id(0), tl.program_id(1) * pattern.COLUMNS + tl.arange(0, pattern.COLUMNS)
    pair, r = head // pattern.R, head % pattern.R
    part = tl.arange(0, pattern.PARTS)
    at = ((pair * P + part) * pattern.R + r).to(tl.int64)
    m = tl.load(peak + at, mask=part < P, other=float("-inf"))
    weight = tl.exp(m - tl.max(m, 0))
    s = tl.sum(tl.load(total + at, mask=part < P, other=0.0) * weight, 0)
    mask = (part < P)[:, None] & (column < pattern.DV)[None, :]
    sums = tl.sum(tl.load(parts + at[:, None] * pattern.DV + column[None, :], mask=mask, other=0.0) * weight[:, None], 0)
    tl.store(out + head * pattern.DV + column, (sums / s).to(out.dtype.element_ty), mask=column < pattern.DV)


class Kind(NamedTuple):
    """What is known when a kernel is compiled."""

    G: int
    R: int
    D: int
    DV: int
    ROWS: int
    """Query heads of a program, rounded up to what a product takes."""
    WIDE: int
    """Columns of a head that are multiplied as matrices: few more than a power of two are added one by one."""
    WIDE_V: int
    KEYS: int
    COLUMNS: int
    PARTS: int
    """Parts, rounded up to a power of two."""
    q_h: int
    """Strides of heads and keys: known, they say how many columns can be read at once."""
    k_s: int
    k_g: int
    v_s: int
    v_g: int
    window: bool
    documents: bool
    slopes: bool
    softcap: bool
    placed: bool
    early: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, documents: tuple[Tensor, Tensor] | None, slopes: Tensor | None,
    softcap: float, index: Tensor | None = None, launch: Launch = LAUNCH,
) -> Tensor:  # fmt: skip
    """q (B, 1, H, D), k (B, S, G, D), v (B, S, G, Dv), the rest as in `Pattern` -> (B, 1, H, Dv). Every query must see a key."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, _, H, D), (S, G), DV = q.shape, k.shape[1:3], v.shape[-1]
    blocks = triton.cdiv(S, launch.keys)
    length = triton.cdiv(blocks, max(1, min(blocks, launch.programs // (B * G)))) * launch.keys
    P, R = triton.cdiv(S, length), H // G
    width_v = max(16, triton.next_power_of_2(DV))
    kind = Kind(
        *(
            G,
            R,
            D,
            DV,
            max(16, triton.next_power_of_2(R)),
            _width(D),
            width_v,
            launch.keys,
            min(COLUMNS, width_v),
            triton.next_power_of_2(P),
        ),
        q_h=q.stride(2),
        k_s=k.stride(1),
        k_g=k.stride(2),
        v_s=v.stride(1),
        v_g=v.stride(2),
        window=bool(window),
        documents=documents is not None,
        slopes=slopes is not None,
        softcap=bool(softcap),
        placed=index is not None,
        early=early(q),
    )
    total, peak = (q.new_empty(B * G, P, R, dtype=torch.float32) for _ in range(2))
    parts, out = q.new_empty(B * G, P, R, DV, dtype=torch.float32), q.new_empty(B, 1, H, DV)
    own, numbers = documents or (q, q)
    strides = (q.stride(0), k.stride(0), v.stride(0), own.stride(0), numbers.stride(0))
    with torch.cuda.device_of(q):
        given: tuple[Any, ...] = (own, numbers, q if slopes is None else slopes, q if index is None else index)
        _parts[(B * G, P)](
            q, k, v, *given, total, peak, parts, S, length, scale, softcap or 1.0, window, *strides, pattern=kind, num_warps=launch.warps,
            **options(kind.early),
        )  # fmt: skip
        _together[(B * H, triton.cdiv(DV, kind.COLUMNS))](
            total, peak, parts, out, P, pattern=kind, num_warps=launch.warps, **options(kind.early)
        )
    return out


def _width(D: int) -> int:
    below = 1 << (D.bit_length() - 1)
    return below if below >= 16 and D - below <= TAIL else max(16, triton.next_power_of_2(D))
