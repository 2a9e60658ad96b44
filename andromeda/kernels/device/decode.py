"""Triton kernels for attention of one query: one takes the keys in parts, two for each multiprocessor, one puts the parts together.

A program takes a part of the keys of one sequence and one key/value head, and all query heads that read it, so that keys and
values are read once (Flash-Decoding, arXiv 2311.01282). It keeps the running largest logit and sum of FlashAttention
(arXiv 2205.14135); a second kernel weighs the parts by them. Which keys are seen is known on the device alone: there they are cut
into parts, so that a short text in a large cache occupies as many programs as it has blocks of keys, and the others read nothing.

Queries may come as projected (`Raw`): norm, learned scales and rotation are then every program's own, and the newest key is what
the program with the last keys begins with; it writes it into the cache, and nobody has to wait for that.

A head is held as pairs of columns that turn together (`kernels/device/qk.py`). Shapes: B sequences, S keys, H query heads, G
key/value heads, R = H / G, D and Dv dimensions of a head, P pairs, rounded up to a power of two, N parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.kernels.device.early import begin, early, fetch, options, wait
from andromeda.kernels.device.qk import _norm


class Launch(NamedTuple):
    """How the work is cut."""

    keys: int
    """That a program reads at once, a power of two from 16 on."""
    programs: int
    """That there are in all, about."""
    warps: int


LAUNCH = Launch(32, 264, 4)
"""Two programs for nearly each of a large GPU's 132 multiprocessors: while one computes, the other's keys and values come."""
COLUMNS = 16
"""Dimensions of a head that a program of the second kernel puts together."""
AHEAD = 24 * 2**20
"""Bytes of the weights to come that are brought into the L2 cache meanwhile: about half of what an H100's or H200's holds."""


class Raw(NamedTuple):
    """What makes queries and the newest key of what was projected; None where there is nothing."""

    key: Any = None
    """The newest key of each sequence as projected (B, G, D)."""
    key_b: Any = 0
    key_g: Any = 0
    cos: Any = None
    """The queries' angles (B or 1, HALF) in float32, then the keys'."""
    sin: Any = None
    key_cos: Any = None
    key_sin: Any = None
    table_b: Any = 0
    """From one sequence's angles to the next's, 0 where all share them."""
    scale: Any = None
    """Learned scales of queries (H, 1) or (H, D), and of keys (G, 1) or (G, D)."""
    key_scale: Any = None
    slopes: Any = None
    """Folded ALiBi: slopes (H,) over the softmax scale, and the digits (TAIL,) that the cache keeps behind a key."""
    digits: Any = None


class Kind(NamedTuple):
    """What is known when a kernel is compiled."""

    G: int
    R: int
    D: int
    """Columns of a head that are multiplied."""
    DV: int
    ROWS: int
    """Query heads of a program, rounded up to what a product takes."""
    P: int
    HALF: int
    """Pairs that turn, where queries come as projected."""
    WIDE_V: int
    KEYS: int
    COLUMNS: int
    PARTS: int
    """Parts, rounded up to a power of two."""
    TAIL: int
    """Columns that the cache keeps behind a key."""
    q_h: int
    """Strides of heads and keys: known, they say how many columns can be read at once."""
    k_s: int
    k_g: int
    v_s: int
    v_g: int
    units: Any
    """Divide the strides of q's, k's and v's sequences, which are given as multiples of them."""
    raw: bool
    interleaved: bool
    """Pairs are (2i, 2i + 1); otherwise (i, i + HALF), and what does not turn follows as halves."""
    norm: str
    per_dim: Any
    """Whether the learned scales of queries and of keys are of each dimension."""
    window: bool
    documents: bool
    slopes: bool
    softcap: bool
    placed: bool
    early: bool


@triton.jit
def _columns(kind: tl.constexpr):
    """Columns of the first and the second of each pair where they do not lie side by side, each (P,), and which pairs there are."""
    pair = tl.arange(0, kind.P)
    if 2 * kind.HALF == kind.D:
        first, second = pair, pair + kind.D // 2
    else:
        first = tl.where(pair < kind.HALF, pair, pair + kind.HALF)
        second = tl.where(pair < kind.HALF, pair + kind.HALF, pair + kind.D // 2)
    return first, second, pair < kind.D // 2


@triton.jit
def _read(rows, n: tl.constexpr, kind: tl.constexpr):
    """Vectors of D columns at `rows` (n,) as pairs in float32, each (n, P)."""
    if kind.interleaved:
        column = tl.arange(0, 2 * kind.P)
        whole = tl.load(rows[:, None] + column[None, :], mask=(column < kind.D)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(whole, (n, kind.P, 2)))
    else:
        first, second, exists = _columns(kind)
        a = tl.load(rows[:, None] + first[None, :], mask=exists[None, :], other=0.0)
        b = tl.load(rows[:, None] + second[None, :], mask=exists[None, :], other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _side_by_side(a, b, n: tl.constexpr, kind: tl.constexpr):
    """Interleaved pairs (n, P) as rows of columns (n, 2 P)."""
    return tl.reshape(tl.join(a, b), (n, 2 * kind.P))


@triton.jit
def _turned(a, b, cos, sin, kind: tl.constexpr):
    """Pairs (n, P) turned by a token's angles (HALF,)."""
    pair = tl.arange(0, kind.P)
    c = tl.load(cos + pair, mask=pair < kind.HALF, other=1.0)[None, :]
    s = tl.load(sin + pair, mask=pair < kind.HALF, other=0.0)[None, :]
    return a * c - b * s, b * c + a * s


@triton.jit
def _prepared(x, scale, cos, sin, head, n: tl.constexpr, per_dim: tl.constexpr, kind: tl.constexpr):
    """Heads `head` (n,) as projected, pointers x (n,), as attention takes them: pairs, each (n, P) in the type of x."""
    a, b = _read(x, n, kind)
    if kind.norm != "none":
        factor, _ = _norm(a, b, kind)
        a, b = a * factor, b * factor
    if scale is not None:
        if per_dim:
            scale_a, scale_b = _read(scale + head * kind.D, n, kind)
        else:
            scale_a = tl.load(scale + head).to(tl.float32)[:, None]
            scale_b = scale_a
        a, b = a * scale_a, b * scale_b
    if kind.HALF > 0:
        a, b = _turned(a, b, cos, sin, kind)
    return a.to(x.dtype.element_ty), b.to(x.dtype.element_ty)


@triton.jit
def _angles(raw, b, kind: tl.constexpr):
    """Where a sequence's angles lie: the queries' cosines and sines, then the keys'."""
    if kind.HALF == 0:
        cos, sin, key_cos, key_sin = raw.cos, raw.sin, raw.key_cos, raw.key_sin
    else:
        at = b * raw.table_b * kind.HALF
        cos, sin, key_cos, key_sin = raw.cos + at, raw.sin + at, raw.key_cos + at, raw.key_sin + at
    return cos, sin, key_cos, key_sin


@triton.jit
def _biased(logits, slope, distance, scale, softcap, raw, heads, kind: tl.constexpr):
    """Products (r, n) of queries and keys -> logits. `slope` (H,) or None; `distance` (n,) from the query."""
    logits *= scale
    if kind.softcap:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    if kind.slopes:
        logits -= tl.load(slope + heads).to(tl.float32)[:, None] * distance.to(tl.float32)[None, :]
    if raw.slopes is not None:
        logits -= tl.load(raw.slopes + heads).to(tl.float32)[:, None] * scale * distance.to(tl.float32)[None, :]
    return logits


@triton.jit
def _extent(last, window, N, kind: tl.constexpr):
    """First key that is seen, the first block of keys with one, blocks of a part, and parts that have any."""
    first = tl.maximum(last + 1 - window, 0) if kind.window else 0
    block = first // kind.KEYS
    blocks = last // kind.KEYS + 1 - block
    each = tl.cdiv(blocks, N)
    return first, block, each, tl.cdiv(blocks, each)


@triton.jit
def _last(index, S, kind: tl.constexpr):
    """Place of the query among the keys."""
    return tl.load(index).to(tl.int32) if kind.placed else S - 1


@triton.jit
def _keep(at, a, b, raw, kind: tl.constexpr):
    """Write the newest key, pairs (1, P), to its place in the cache, with the digits behind it."""
    if kind.interleaved:
        column = tl.arange(0, 2 * kind.P)[None, :]
        tl.store(at + column, _side_by_side(a, b, 1, kind), mask=column < kind.D)
    else:
        first, second, exists = _columns(kind)
        tl.store(at + first[None, :], a, mask=exists[None, :])
        tl.store(at + second[None, :], b, mask=exists[None, :])
    if kind.TAIL > 0:
        tail = tl.arange(0, kind.TAIL)
        tl.store(at + kind.D + tail, tl.load(raw.digits + tail).to(at.dtype.element_ty))


@triton.jit
def _newest(qa, qb, raw, angles, k, v, b, g, last, slopes, heads, scale, softcap, kind: tl.constexpr):
    """The newest key, which is kept: its logits (r,) and its value (Dv,)."""
    one, dv = tl.zeros((1,), tl.int32), tl.arange(0, kind.WIDE_V)
    row = raw.key + b * raw.key_b + g * raw.key_g + one
    ka, kb = _prepared(row, raw.key_scale, angles[2], angles[3], g + one, 1, kind.per_dim[1], kind)
    _keep(k + last.to(tl.int64) * kind.k_s, ka, kb, raw, kind)
    products = tl.sum(qa.to(tl.float32) * ka.to(tl.float32) + qb.to(tl.float32) * kb.to(tl.float32), 1)
    logits = _biased(products[:, None], slopes, one, scale, softcap, raw, heads, kind)
    value = tl.load(v + last.to(tl.int64) * kind.v_s + dv, mask=dv < kind.DV, other=0.0)
    return tl.sum(logits, 1), value.to(tl.float32)


@triton.jit
def _products(queries, k, at, live, kind: tl.constexpr):
    """Inner products (r, n) of the queries with the keys at `at` (n,)."""
    if kind.raw and not kind.interleaved:
        first, second, exists = _columns(kind)
        there = live[None, :] & exists[:, None]
        keys_a = tl.load(k + at[None, :] * kind.k_s + first[:, None], mask=there, other=0.0)
        keys_b = tl.load(k + at[None, :] * kind.k_s + second[:, None], mask=there, other=0.0)
        found = tl.dot(queries[1], keys_b, tl.dot(queries[0], keys_a, input_precision="ieee"), input_precision="ieee")
    else:
        column = tl.arange(0, 2 * kind.P)
        keys = tl.load(k + at[None, :] * kind.k_s + column[:, None], mask=live[None, :] & (column < kind.D)[:, None], other=0.0)
        found = tl.dot(queries[0], keys, input_precision="ieee")
    return found


@triton.jit
def _fetch(x, start, count, g, STRIDE: tl.constexpr, kind: tl.constexpr):
    """Ask for a key head's share of `count` tokens of a sequence's cache."""
    size = count * STRIDE // kind.G
    fetch(x + start.to(tl.int64) * STRIDE + g * size, size, kind)


@triton.jit
def _fetch_share(weight, count, program, programs, kind: tl.constexpr):
    """Ask for a program's share of the first `count` numbers of a weight that a later kernel reads."""
    if weight is not None:
        share = tl.cdiv(count, programs)
        fetch(weight + program.to(tl.int64) * share, tl.minimum(share, count - program * share), kind)


@triton.jit
def _parts(
    q, k, v, raw, own, numbers, slopes, index, total, peak, out, S, scale, softcap, window, q_b, k_b, v_b, own_b, numbers_b,
    weight, weight_size, kind: tl.constexpr,
):  # fmt: skip
    """One part: its weighted values (B, G, N, R, Dv) over its own largest logit, with that and the sum of exponentials (B, G, N, R)."""
    begin(kind)
    if not kind.raw:
        wait(kind)
    pair, part, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, g = (pair // kind.G).to(tl.int64), pair % kind.G
    row, dv = tl.arange(0, kind.ROWS), tl.arange(0, kind.WIDE_V)
    heads = g * kind.R + tl.minimum(row, kind.R - 1)
    last = _last(index, S, kind)
    first, block, each, _ = _extent(last, window, N, kind)
    start = (block + part * each) * kind.KEYS
    end = tl.minimum(start + each * kind.KEYS, last + 1)
    q += b * q_b * kind.units[0]
    k += b * k_b * kind.units[1]
    v += b * v_b * kind.units[2]
    if kind.raw:
        # A cache holds what steps before have written, all heads of a token side by side: each program asks for its share.
        if start < end:
            _fetch(k, start, end - start, g, kind.k_s, kind)
            _fetch(v, start, end - start, g, kind.v_s, kind)
        _fetch_share(weight, weight_size, pair * N + part, tl.num_programs(0) * N, kind)
        wait(kind)
    # Behind the last part there is nothing to do.
    if start <= last:
        k += g * kind.k_g
        v += g * kind.v_g
        document = tl.load(own + b * own_b) if kind.documents else 0
        m = tl.full((kind.ROWS,), float("-inf"), tl.float32)
        s = tl.full((kind.ROWS,), 0.0, tl.float32)
        sums = tl.full((kind.ROWS, kind.WIDE_V), 0.0, tl.float32)
        if kind.raw:
            angles = _angles(raw, b, kind)
            qa, qb = _prepared(q + heads * kind.q_h, raw.scale, angles[0], angles[1], heads, kind.ROWS, kind.per_dim[0], kind)
            if end > last:
                m, value = _newest(qa, qb, raw, angles, k, v, b, g, last, slopes, heads, scale, softcap, kind)
                s += 1.0
                sums += value[None, :]
                end = last
            queries = (_side_by_side(qa, qb, kind.ROWS, kind),) if kind.interleaved else (qa, qb)
        else:
            column = tl.arange(0, 2 * kind.P)
            queries = (tl.load(q + heads[:, None] * kind.q_h + column[None, :], mask=(column < kind.D)[None, :], other=0.0),)
        for at in range(start, end, kind.KEYS):
            position = at + tl.arange(0, kind.KEYS)
            live = position < end
            where = position.to(tl.int64)
            products = _products(queries, k, where, live, kind)
            values = tl.load(v + where[:, None] * kind.v_s + dv[None, :], mask=live[:, None] & (dv < kind.DV)[None, :], other=0.0)
            logits = _biased(products, slopes, last - position, scale, softcap, raw, heads, kind)
            seen = live & (position >= first)
            if kind.documents:
                seen = seen & (tl.load(numbers + b * numbers_b + position, mask=seen, other=0) == document)
            logits = tl.where(seen[None, :], logits, float("-inf"))
            above = tl.maximum(m, tl.max(logits, 1))
            # Where nothing is seen yet, minus infinity stands on both sides.
            safe = tl.where(above == float("-inf"), 0.0, above)
            weights = tl.exp(logits - safe[:, None])
            fade = tl.exp(m - safe)
            s = s * fade + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
            m = above
        to = ((pair * N + part) * kind.R + row).to(tl.int64)
        tl.store(peak + to, m, mask=row < kind.R)
        tl.store(total + to, s, mask=row < kind.R)
        tl.store(out + to[:, None] * kind.DV + dv[None, :], sums, mask=(row < kind.R)[:, None] & (dv < kind.DV)[None, :])


@triton.jit
def _together(total, peak, parts, out, index, S, window, N, weight, weight_size, kind: tl.constexpr):
    """Some columns of one head's average (B, H, Dv), from its parts."""
    begin(kind)
    programs = tl.num_programs(1)
    _fetch_share(weight, weight_size, tl.program_id(0) * programs + tl.program_id(1), tl.num_programs(0) * programs, kind)
    wait(kind)
    head, column = tl.program_id(0), tl.program_id(1) * kind.COLUMNS + tl.arange(0, kind.COLUMNS)
    pair, r = head // kind.R, head % kind.R
    _, _, _, live = _extent(_last(index, S, kind), window, N, kind)
    part = tl.arange(0, kind.PARTS)
    at = ((pair * N + part) * kind.R + r).to(tl.int64)
    m = tl.load(peak + at, mask=part < live, other=float("-inf"))
    weight = tl.exp(m - tl.max(m, 0))
    s = tl.sum(tl.load(total + at, mask=part < live, other=0.0) * weight, 0)
    mask = (part < live)[:, None] & (column < kind.DV)[None, :]
    sums = tl.sum(tl.load(parts + at[:, None] * kind.DV + column[None, :], mask=mask, other=0.0) * weight[:, None], 0)
    tl.store(out + head * kind.DV + column, (sums / s).to(out.dtype.element_ty), mask=column < kind.DV)


class Projected(NamedTuple):
    """What turns projections into queries and the newest key, as `andromeda.kernels.qk.Form` has it for one token."""

    key: Tensor
    """(B, 1, G, D)."""
    scales: tuple[Tensor | None, Tensor | None]
    tables: list[Tensor]
    tails: list[Tensor]
    norm: str
    layout: str
    ahead: Sequence[Tensor] = ()
    """Two contiguous weights that the kernels after these read."""

    @property
    def half(self) -> int:
        """Pairs that turn."""
        return self.tables[0].shape[-1] if self.tables else 0

    def raw(self) -> Raw:
        """For the kernel."""
        cos, sin, key_cos, key_sin = [t.contiguous() for t in self.tables] or (None, None, None, None)
        shared = cos is None or cos.shape[0] == 1
        scale, key_scale = (None if s is None else s.contiguous() for s in self.scales)
        slopes, digits = self.tails or (None, None)
        return Raw(
            *(self.key, self.key.stride(0), self.key.stride(2), cos, sin, key_cos, key_sin, 0 if shared else 1),
            *(scale, key_scale, slopes, None if digits is None else digits.contiguous()),
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, documents: tuple[Tensor, Tensor] | None, slopes: Tensor | None,
    softcap: float, index: Tensor | None = None, projected: Projected | None = None, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """q (B, 1, H, D), k (B, S, G, D), v (B, S, G, Dv), the rest as in `Pattern` -> (B, 1, H, Dv). Every query must see a key.

    projected: q is as projected, and the newest key is made of that and written into k (B, S, G, D or D + 4), which must have its
    columns side by side, at `index`; its value is in v.
    """
    launch = launch or LAUNCH
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, _, H, D), (S, G), DV = q.shape, k.shape[1:3], v.shape[-1]
    N = max(1, min(triton.cdiv(S, launch.keys), launch.programs // (B * G)))
    units = tuple(gcd(16, x.stride(0)) for x in (q, k, v))
    width_v = max(16, triton.next_power_of_2(DV))
    kind = Kind(
        G=G,
        R=H // G,
        D=D,
        DV=DV,
        ROWS=max(16, triton.next_power_of_2(H // G)),
        P=max(16, triton.next_power_of_2(D // 2)),
        HALF=projected.half if projected else 0,
        WIDE_V=width_v,
        KEYS=launch.keys,
        COLUMNS=min(COLUMNS, width_v),
        PARTS=triton.next_power_of_2(N),
        TAIL=k.shape[-1] - D if projected else 0,
        q_h=q.stride(2),
        k_s=k.stride(1),
        k_g=k.stride(2),
        v_s=v.stride(1),
        v_g=v.stride(2),
        units=units,
        raw=projected is not None,
        interleaved=projected is not None and projected.layout == "interleaved",
        norm=projected.norm if projected else "none",
        per_dim=_per_dim(projected),
        window=bool(window),
        documents=documents is not None,
        slopes=slopes is not None,
        softcap=bool(softcap),
        placed=index is not None,
        early=early(q),
    )
    total, peak = (q.new_empty(B * G, N, H // G, dtype=torch.float32) for _ in range(2))
    parts, out = q.new_empty(B * G, N, H // G, DV, dtype=torch.float32), q.new_empty(B, 1, H, DV)
    own, numbers = documents or (q, q)
    at = q if index is None else index
    steps = (*(x.stride(0) // unit for x, unit in zip((q, k, v), units, strict=True)), own.stride(0), numbers.stride(0))
    next_one, next_two = _ahead(projected.ahead if projected and kind.early else ())
    with torch.cuda.device_of(q):
        _parts[(B * G, N)](
            *(q, k, v, projected.raw() if projected else Raw(), own, numbers, q if slopes is None else slopes, at, total, peak, parts),
            *(S, scale, softcap or 1.0, window, *steps, *next_one),
            kind=kind,
            num_warps=launch.warps,
            **options(kind.early),
        )
        _together[(B * H, triton.cdiv(DV, kind.COLUMNS))](
            total, peak, parts, out, at, S, window, N, *next_two, kind=kind, num_warps=launch.warps, **options(kind.early)
        )
    return out


def _ahead(weights: Sequence[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Each of two weights and how many of its numbers are fetched, within `AHEAD` bytes in all."""
    left, found = AHEAD, list[tuple[Tensor | None, int]]()
    for weight in weights:
        count = min(weight.numel(), left // weight.element_size())
        left -= count * weight.element_size()
        found.append((weight if count else None, count))
    return found or [(None, 0), (None, 0)]


def _per_dim(projected: Projected | None) -> tuple[bool, ...]:
    """Whether the learned scales are of each dimension."""
    return tuple(s is not None and s.shape[-1] > 1 for s in (projected.scales if projected else (None, None)))
