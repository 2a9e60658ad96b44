"""A Triton kernel for what lies between two products of a layer: add, norm, token shift, 8 bits, in one read and one write.

A program takes some tokens of one sequence, one after the other, and keeps the last one's normalized vector in registers for
the channels that come from the token before. A vector is held in two parts, as `fp8` does it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.float8_activation import parts, scale_of

TOKENS, TOKENS_BACKWARD, WARPS = 8, 32, 4
"""Tokens of a program, and its warps. The backward pass writes a sum for each program."""
WIDE, WARPS_WIDE = 2048, 8
"""Wider vectors than this need more warps in the backward pass, which holds several of them in registers."""


class Form(NamedTuple):
    """What is known when the kernel is compiled."""

    C: int
    """Channels."""
    layer: bool
    """Layer norm, otherwise RMS norm."""
    begin: int
    """Channels `begin` to `end` are of the token before."""
    end: int
    largest: float
    """Largest number of the 8-bit format; 0 leaves y as it is."""
    tokens: int
    """Tokens of a program."""


class Given(NamedTuple):
    """What is read; None where there is nothing."""

    x: Any
    """(B, T, C)."""
    delta: Any
    """What is added to x first (B, T, C)."""
    weight: Any
    """Gain (C,)."""
    bias: Any
    """What is added to the sum that is stored (C,)."""
    past: Any
    """Normalized vector before the first token (B, C)."""
    documents: Any
    """Document numbers (B, T): a token that begins one gets zeros from before."""


class Made(NamedTuple):
    """What is written; None where nothing is."""

    y: Any
    """(B, T, C)."""
    scales: Any
    """What each row of y was divided by (B, T)."""
    total: Any
    """x + delta + bias (B, T, C)."""
    last: Any
    """Normalized last vector (B, C)."""


@triton.jit
def _sum(given, made, row, column, exists, STORE: tl.constexpr, form: tl.constexpr):
    """x + delta of a row, rounded as it is stored, and stored."""
    at = row * form.C + column
    kind: tl.constexpr = given.x.dtype.element_ty
    value = tl.load(given.x + at, mask=exists, other=0.0).to(tl.float32)
    if given.delta is not None:
        value += tl.load(given.delta + at, mask=exists, other=0.0).to(tl.float32)
    if STORE and made.total is not None:
        stored = value
        if given.bias is not None:
            stored += tl.load(given.bias + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(made.total + at, stored.to(kind), mask=exists)
    return value.to(kind).to(tl.float32)


@triton.jit
def _statistics(a, b, a_exists, b_exists, eps, form: tl.constexpr):
    """Both parts normalized without the gain, and what they were multiplied with."""
    if form.layer:
        mean = (tl.sum(a, 0) + tl.sum(b, 0)) / form.C
        a, b = tl.where(a_exists, a - mean, 0.0), tl.where(b_exists, b - mean, 0.0)
    factor = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / form.C + eps)
    return a * factor, b * factor, factor


@triton.jit
def _gained(of, value, column, exists):
    if of.weight is not None:
        value *= tl.load(of.weight + column, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit
def _rounded(given, value, column, exists):
    """With the gain, rounded to the type of x."""
    return _gained(given, value, column, exists).to(given.x.dtype.element_ty).to(tl.float32)


@triton.jit
def _normal(given, made, row, eps, first, second, STORE: tl.constexpr, form: tl.constexpr):
    """Both parts of a row's normalized vector."""
    a_exists, b_exists = first < form.C, second < form.C
    a = _sum(given, made, row, first, a_exists, STORE, form)
    b = _sum(given, made, row, second, b_exists, STORE, form)
    a, b, _ = _statistics(a, b, a_exists, b_exists, eps, form)
    return _rounded(given, a, first, a_exists), _rounded(given, b, second, b_exists)


@triton.jit
def _moved(column, form: tl.constexpr):
    """Which channels are of the token before."""
    return (column >= form.begin) & (column < form.end)


@triton.jit
def _same(documents, row, has_before):
    """1.0 where the token before is of the same document, or where there is none, else 0.0."""
    same = 1.0
    if documents is not None:
        before = tl.load(documents + row - 1, mask=has_before, other=0)
        same = tl.where(has_before & (tl.load(documents + row) != before), 0.0, 1.0)
    return same


@triton.jit
def _write(made, row, column, value, inverse, form: tl.constexpr):
    if form.largest > 0:
        value = tl.minimum(tl.maximum(value * inverse, -form.largest), form.largest)
    tl.store(made.y + row * form.C + column, value.to(made.y.dtype.element_ty), mask=column < form.C)


@triton.jit
def _norm_shift(given, made, T, eps, form: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    blocks = tl.cdiv(T, form.tokens)
    batch = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * form.tokens
    base = batch.to(tl.int64) * T
    first, second = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    a_before, b_before = tl.zeros((FIRST,), tl.float32), tl.zeros((SECOND,), tl.float32)
    if form.end > form.begin:
        if start == 0:
            a_before = tl.load(given.past + batch * form.C + first, mask=first < form.C, other=0.0).to(tl.float32)
            b_before = tl.load(given.past + batch * form.C + second, mask=second < form.C, other=0.0).to(tl.float32)
        else:
            a_before, b_before = _normal(given, made, base + start - 1, eps, first, second, False, form)
    for token in range(start, min(start + form.tokens, T)):
        row = base + token
        a, b = _normal(given, made, row, eps, first, second, True, form)
        y_a, y_b = a, b
        if form.end > form.begin:
            same = _same(given.documents, row, token > 0)
            y_a = tl.where(_moved(first, form), a_before * same, a)
            y_b = tl.where(_moved(second, form), b_before * same, b)
            a_before, b_before = a, b
        inverse = 1.0
        if form.largest > 0:
            scale = scale_of(tl.maximum(tl.max(tl.abs(y_a), 0), tl.max(tl.abs(y_b), 0)), form.largest)
            tl.store(made.scales + row, scale)
            inverse = 1.0 / scale
        _write(made, row, first, y_a, inverse, form)
        _write(made, row, second, y_b, inverse, form)
    if made.last is not None:  # noqa: SIM102 - known when it is compiled, the other is not
        if start + form.tokens >= T:
            kind: tl.constexpr = made.last.dtype.element_ty
            tl.store(made.last + batch * form.C + first, a_before.to(kind), mask=first < form.C)
            tl.store(made.last + batch * form.C + second, b_before.to(kind), mask=second < form.C)


class Back(NamedTuple):
    """What the backward pass reads and writes; None where there is nothing."""

    x: Any
    """What was normalized (B, T, C)."""
    weight: Any
    documents: Any
    dy: Any
    dtotal: Any
    """Gradient of the sum that was given back (B, T, C)."""
    dx: Any
    partial: Any
    """Gradient of the gain, for each program (programs, C)."""


@triton.jit
def _both(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _two_sums(a, b, of_a, of_b):
    """Sums over both parts of a and b, and of of_a and of_b, whose warps wait for each other once for both."""
    first, of_first = tl.reduce((a, of_a), 0, _both)
    second, of_second = tl.reduce((b, of_b), 0, _both)
    return first + second, of_first + of_second


@triton.jit
def _row(x, row, column, exists, form: tl.constexpr):
    """Some channels of a row as they are stored, zero where there are none."""
    return tl.load(x + row * form.C + column, mask=exists, other=0.0)


@triton.jit
def _store_row(x, value, row, column, exists, form: tl.constexpr):
    tl.store(x + row * form.C + column, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _norm_shift_backward(back, T, eps, form: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    blocks = tl.cdiv(T, form.tokens)
    batch = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * form.tokens
    base = batch.to(tl.int64) * T
    first, second = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    a_exists, b_exists = first < form.C, second < form.C
    a_sum, b_sum = tl.zeros((FIRST,), tl.float32), tl.zeros((SECOND,), tl.float32)
    # Rows are asked for a token ahead, so that a program need not wait for memory and for its warps in turn; until then they
    # stay in the type that they are stored in, which takes half the registers in 16 bits.
    begin, end, after = base + start, base + min(start + form.tokens, T), base + T
    more = begin + 1 < after
    a_next, b_next = _row(back.dy, begin + 1, first, a_exists & more, form), _row(back.dy, begin + 1, second, b_exists & more, form)
    a_own, b_own = _row(back.dy, begin, first, a_exists, form), _row(back.dy, begin, second, b_exists, form)
    a_x, b_x = _row(back.x, begin, first, a_exists, form), _row(back.x, begin, second, b_exists, form)
    for row in range(begin, end):
        a, b = a_x.to(tl.float32), b_x.to(tl.float32)
        further, more = row + 1 < end, row + 2 < tl.minimum(end + 1, after)
        a_dy, b_dy = _row(back.dy, row + 2, first, a_exists & more, form), _row(back.dy, row + 2, second, b_exists & more, form)
        a_x, b_x = _row(back.x, row + 1, first, a_exists & further, form), _row(back.x, row + 1, second, b_exists & further, form)
        if back.dtotal is not None:
            a_passed, b_passed = _row(back.dtotal, row, first, a_exists, form), _row(back.dtotal, row, second, b_exists, form)
        a_dn, b_dn = a_own.to(tl.float32), b_own.to(tl.float32)
        if form.end > form.begin:
            # What this token gave to the next one.
            same = _same(back.documents, tl.minimum(row + 1, after - 1), row + 1 < after)
            a_dn = tl.where(_moved(first, form), a_next.to(tl.float32) * same, a_dn)
            b_dn = tl.where(_moved(second, form), b_next.to(tl.float32) * same, b_dn)
        a_own, b_own, a_next, b_next = a_next, b_next, a_dy, b_dy
        a_d, b_d = _gained(back, a_dn, first, a_exists), _gained(back, b_dn, second, b_exists)
        shift = 0.0
        if form.layer:
            mean, shift = _two_sums(a, b, a_d, b_d)
            mean, shift = mean / form.C, shift / form.C
            a, b = tl.where(a_exists, a - mean, 0.0), tl.where(b_exists, b - mean, 0.0)
        square, along = _two_sums(a * a, b * b, a_d * a, b_d * b)
        factor = 1.0 / tl.sqrt(square / form.C + eps)
        a, b, along = a * factor, b * factor, along * factor / form.C
        a_sum += a_dn * a
        b_sum += b_dn * b
        a_dx, b_dx = factor * (a_d - shift - a * along), factor * (b_d - shift - b * along)
        if back.dtotal is not None:
            a_dx, b_dx = a_dx + a_passed.to(tl.float32), b_dx + b_passed.to(tl.float32)
        _store_row(back.dx, a_dx, row, first, a_exists, form)
        _store_row(back.dx, b_dx, row, second, b_exists, form)
    if back.partial is not None:
        at = back.partial + tl.program_id(0) * form.C
        tl.store(at + first, a_sum, mask=a_exists)
        tl.store(at + second, b_sum, mask=b_exists)


def _halves(C: int) -> dict[str, int]:
    first, second = parts(C)
    return {"FIRST": first, "SECOND": second} if second else {"FIRST": first // 2, "SECOND": first // 2}


def norm_shift(given: Given, made: Made, layer: bool, eps: float, moved: tuple[int, int], largest: float) -> None:
    """Fill `made` from `given`, both of contiguous tensors; moved: channels from and to, of the token before."""
    B, T, C = given.x.shape
    form = Form(C, layer, *moved, largest, TOKENS)
    with torch.cuda.device_of(given.x):
        _norm_shift[(B * triton.cdiv(T, TOKENS),)](given, made, T, eps, form, **_halves(C), num_warps=WARPS)


def backward(
    x: Tensor, weight: Tensor | None, documents: Tensor | None, dy: Tensor, dtotal: Tensor | None, layer: bool, eps: float,
    moved: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x (B, T, C) and of the gain (C,), all of contiguous tensors."""
    B, T, C = x.shape
    programs = B * triton.cdiv(T, TOKENS_BACKWARD)
    dx = torch.empty_like(x)
    partial = None if weight is None else x.new_empty(programs, C, dtype=torch.float32)
    form = Form(C, layer, *moved, 0.0, TOKENS_BACKWARD)
    back = Back(x, weight, documents, dy, dtotal, dx, partial)
    with torch.cuda.device_of(x):
        _norm_shift_backward[(programs,)](back, T, eps, form, **_halves(C), num_warps=WARPS_WIDE if C > WIDE else WARPS)
    # One order of summation, whatever the order in which the blocks ran.
    return dx, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
