"""A Triton kernel for what lies between two products of a layer: add, norm, token shift, 8 bits, in one read and one write.

A program takes some tokens of one sequence, one after the other, and keeps the last one's normalised vector in registers for
the channels that come from the token before. A vector is held in two parts, as `fp8` does it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from andromeda.kernels.device.fp8 import parts, scale_of

TOKENS, WARPS = 8, 4


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
    """Normalised vector before the first token (B, C)."""


class Made(NamedTuple):
    """What is written; None where nothing is."""

    y: Any
    """(B, T, C)."""
    scales: Any
    """What each row of y was divided by (B, T)."""
    total: Any
    """x + delta + bias (B, T, C)."""
    last: Any
    """Normalised last vector (B, C)."""


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
def _scaled(given, value, factor, column, exists):
    """Normalised, with the gain, rounded to the type of x."""
    value = value * factor
    if given.weight is not None:
        value *= tl.load(given.weight + column, mask=exists, other=0.0).to(tl.float32)
    return value.to(given.x.dtype.element_ty).to(tl.float32)


@triton.jit
def _normal(given, made, row, eps, first, second, STORE: tl.constexpr, form: tl.constexpr):
    """Both parts of a row's normalised vector."""
    a_exists, b_exists = first < form.C, second < form.C
    a = _sum(given, made, row, first, a_exists, STORE, form)
    b = _sum(given, made, row, second, b_exists, STORE, form)
    if form.layer:
        mean = (tl.sum(a, 0) + tl.sum(b, 0)) / form.C
        a, b = tl.where(a_exists, a - mean, 0.0), tl.where(b_exists, b - mean, 0.0)
    factor = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / form.C + eps)
    return _scaled(given, a, factor, first, a_exists), _scaled(given, b, factor, second, b_exists)


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
            y_a = tl.where((first >= form.begin) & (first < form.end), a_before, a)
            y_b = tl.where((second >= form.begin) & (second < form.end), b_before, b)
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


def norm_shift(given: Given, made: Made, layer: bool, eps: float, moved: tuple[int, int], largest: float) -> None:
    """Fill `made` from `given`, both of contiguous tensors; moved: channels from and to, of the token before."""
    B, T, C = given.x.shape
    first, second = parts(C)
    if not second:
        first, second = first // 2, first // 2
    form = Form(C, layer, *moved, largest, TOKENS)
    with torch.cuda.device_of(given.x):
        _norm_shift[(B * triton.cdiv(T, TOKENS),)](given, made, T, eps, form, FIRST=first, SECOND=second, num_warps=WARPS)
