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

from andromeda.ops.triton.float8_activation import row_scale, split_power_of_two

TOKENS_FORWARD, TOKENS_BACKWARD, WARPS = 8, 32, 4
"""Tokens of a program, and its warps. The backward pass writes a sum for each program."""
WIDE_CHANNELS, WARPS_WIDE = 2048, 8
"""Wider vectors than this need more warps in the backward pass, which holds several of them in registers."""


class NormShiftConstants(NamedTuple):
    """What is known when the kernel is compiled."""

    C: int
    """Channels."""
    layer_norm: bool
    """Layer norm, otherwise RMS norm."""
    shift_begin: int
    """Channels `begin` to `end` are of the token before."""
    shift_end: int
    fp8_max: float
    """Largest number of the 8-bit format; 0 leaves y as it is."""
    tokens: int
    """Tokens of a program."""


class NormShiftInputs(NamedTuple):
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


class NormShiftOutputs(NamedTuple):
    """What is written; None where nothing is."""

    y: Any
    """(B, T, C)."""
    scales: Any
    """What each row of y was divided by (B, T)."""
    residual: Any
    """x + delta + bias (B, T, C)."""
    last: Any
    """Normalized last vector (B, C)."""


@triton.jit
def _load_sum(inputs, outputs, row, column, mask, STORE: tl.constexpr, constants: tl.constexpr):
    """x + delta of a row, rounded as it is stored, and stored."""
    at = row * constants.C + column
    kind: tl.constexpr = inputs.x.dtype.element_ty
    value = tl.load(inputs.x + at, mask=mask, other=0.0).to(tl.float32)
    if inputs.delta is not None:
        value += tl.load(inputs.delta + at, mask=mask, other=0.0).to(tl.float32)
    if STORE and outputs.residual is not None:
        stored = value
        if inputs.bias is not None:
            stored += tl.load(inputs.bias + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(outputs.residual + at, stored.to(kind), mask=mask)
    return value.to(kind).to(tl.float32)


@triton.jit
def _normalize_row(a, b, a_mask, b_mask, eps, constants: tl.constexpr):
    """Both parts normalized without the gain, and what they were multiplied with."""
    if constants.layer_norm:
        mean = (tl.sum(a, 0) + tl.sum(b, 0)) / constants.C
        a, b = tl.where(a_mask, a - mean, 0.0), tl.where(b_mask, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / constants.C + eps)
    return a * rstd, b * rstd, rstd


@triton.jit
def _apply_gain(of, value, column, mask):
    if of.weight is not None:
        value *= tl.load(of.weight + column, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _apply_gain_and_round(inputs, value, column, mask):
    """With the gain, rounded to the type of x."""
    return _apply_gain(inputs, value, column, mask).to(inputs.x.dtype.element_ty).to(tl.float32)


@triton.jit
def _normalized_row(inputs, outputs, row, eps, first, second, STORE: tl.constexpr, constants: tl.constexpr):
    """Both parts of a row's normalized vector."""
    a_mask, b_mask = first < constants.C, second < constants.C
    a = _load_sum(inputs, outputs, row, first, a_mask, STORE, constants)
    b = _load_sum(inputs, outputs, row, second, b_mask, STORE, constants)
    a, b, _ = _normalize_row(a, b, a_mask, b_mask, eps, constants)
    return _apply_gain_and_round(inputs, a, first, a_mask), _apply_gain_and_round(inputs, b, second, b_mask)


@triton.jit
def _is_shifted(column, constants: tl.constexpr):
    """Which channels are of the token before."""
    return (column >= constants.shift_begin) & (column < constants.shift_end)


@triton.jit
def _same_document(documents, row, has_before):
    """1.0 where the token before is of the same document, or where there is none, else 0.0."""
    same_document = 1.0
    if documents is not None:
        before = tl.load(documents + row - 1, mask=has_before, other=0)
        same_document = tl.where(has_before & (tl.load(documents + row) != before), 0.0, 1.0)
    return same_document


@triton.jit
def _store_output(outputs, row, column, value, inverse, constants: tl.constexpr):
    if constants.fp8_max > 0:
        value = tl.minimum(tl.maximum(value * inverse, -constants.fp8_max), constants.fp8_max)
    tl.store(outputs.y + row * constants.C + column, value.to(outputs.y.dtype.element_ty), mask=column < constants.C)


@triton.jit
def _add_norm_shift_kernel(inputs, outputs, T, eps, constants: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    blocks = tl.cdiv(T, constants.tokens)
    batch = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * constants.tokens
    base = batch.to(tl.int64) * T
    first, second = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    a_before, b_before = tl.zeros((FIRST,), tl.float32), tl.zeros((SECOND,), tl.float32)
    if constants.shift_end > constants.shift_begin:
        if start == 0:
            a_before = tl.load(inputs.past + batch * constants.C + first, mask=first < constants.C, other=0.0).to(tl.float32)
            b_before = tl.load(inputs.past + batch * constants.C + second, mask=second < constants.C, other=0.0).to(tl.float32)
        else:
            a_before, b_before = _normalized_row(inputs, outputs, base + start - 1, eps, first, second, False, constants)
    for token in range(start, min(start + constants.tokens, T)):
        row = base + token
        a, b = _normalized_row(inputs, outputs, row, eps, first, second, True, constants)
        y_a, y_b = a, b
        if constants.shift_end > constants.shift_begin:
            same_document = _same_document(inputs.documents, row, token > 0)
            y_a = tl.where(_is_shifted(first, constants), a_before * same_document, a)
            y_b = tl.where(_is_shifted(second, constants), b_before * same_document, b)
            a_before, b_before = a, b
        inverse = 1.0
        if constants.fp8_max > 0:
            scale = row_scale(tl.maximum(tl.max(tl.abs(y_a), 0), tl.max(tl.abs(y_b), 0)), constants.fp8_max)
            tl.store(outputs.scales + row, scale)
            inverse = 1.0 / scale
        _store_output(outputs, row, first, y_a, inverse, constants)
        _store_output(outputs, row, second, y_b, inverse, constants)
    if outputs.last is not None:  # noqa: SIM102 - known when it is compiled, the other is not
        if start + constants.tokens >= T:
            kind: tl.constexpr = outputs.last.dtype.element_ty
            tl.store(outputs.last + batch * constants.C + first, a_before.to(kind), mask=first < constants.C)
            tl.store(outputs.last + batch * constants.C + second, b_before.to(kind), mask=second < constants.C)


class NormShiftGradients(NamedTuple):
    """What the backward pass reads and writes; None where there is nothing."""

    x: Any
    """What was normalized (B, T, C)."""
    weight: Any
    documents: Any
    dy: Any
    dresidual: Any
    """Gradient of the sum that was given back (B, T, C)."""
    dx: Any
    partial: Any
    """Gradient of the gain, for each program (programs, C)."""


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _reduce_two(a, b, of_a, of_b):
    """Sums over both parts of a and b, and of of_a and of_b, whose warps wait for each other once for both."""
    first, of_first = tl.reduce((a, of_a), 0, _add_pairs)
    second, of_second = tl.reduce((b, of_b), 0, _add_pairs)
    return first + second, of_first + of_second


@triton.jit
def _load_row(x, row, column, mask, constants: tl.constexpr):
    """Some channels of a row as they are stored, zero where there are none."""
    return tl.load(x + row * constants.C + column, mask=mask, other=0.0)


@triton.jit
def _store_row(x, value, row, column, mask, constants: tl.constexpr):
    tl.store(x + row * constants.C + column, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_shift_backward_kernel(grads, T, eps, constants: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    blocks = tl.cdiv(T, constants.tokens)
    batch = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * constants.tokens
    base = batch.to(tl.int64) * T
    first, second = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND)
    a_mask, b_mask = first < constants.C, second < constants.C
    a_sum, b_sum = tl.zeros((FIRST,), tl.float32), tl.zeros((SECOND,), tl.float32)
    # Rows are asked for a token ahead, so that a program need not wait for memory and for its warps in turn; until then they
    # stay in the type that they are stored in, which takes half the registers in 16 bits.
    shift_begin, shift_end, after = base + start, base + min(start + constants.tokens, T), base + T
    more = shift_begin + 1 < after
    a_next, b_next = (
        _load_row(grads.dy, shift_begin + 1, first, a_mask & more, constants),
        _load_row(grads.dy, shift_begin + 1, second, b_mask & more, constants),
    )
    a_dy, b_dy = _load_row(grads.dy, shift_begin, first, a_mask, constants), _load_row(grads.dy, shift_begin, second, b_mask, constants)
    a_x, b_x = _load_row(grads.x, shift_begin, first, a_mask, constants), _load_row(grads.x, shift_begin, second, b_mask, constants)
    for row in range(shift_begin, shift_end):
        a, b = a_x.to(tl.float32), b_x.to(tl.float32)
        has_next, more = row + 1 < shift_end, row + 2 < tl.minimum(shift_end + 1, after)
        a_prefetched, b_prefetched = (
            _load_row(grads.dy, row + 2, first, a_mask & more, constants),
            _load_row(grads.dy, row + 2, second, b_mask & more, constants),
        )
        a_x, b_x = (
            _load_row(grads.x, row + 1, first, a_mask & has_next, constants),
            _load_row(grads.x, row + 1, second, b_mask & has_next, constants),
        )
        if grads.dresidual is not None:
            a_residual, b_residual = (
                _load_row(grads.dresidual, row, first, a_mask, constants),
                _load_row(grads.dresidual, row, second, b_mask, constants),
            )
        a_dn, b_dn = a_dy.to(tl.float32), b_dy.to(tl.float32)
        if constants.shift_end > constants.shift_begin:
            # What this token gave to the next one.
            same_document = _same_document(grads.documents, tl.minimum(row + 1, after - 1), row + 1 < after)
            a_dn = tl.where(_is_shifted(first, constants), a_next.to(tl.float32) * same_document, a_dn)
            b_dn = tl.where(_is_shifted(second, constants), b_next.to(tl.float32) * same_document, b_dn)
        a_dy, b_dy, a_next, b_next = a_next, b_next, a_prefetched, b_prefetched
        a_d, b_d = _apply_gain(grads, a_dn, first, a_mask), _apply_gain(grads, b_dn, second, b_mask)
        grad_mean = 0.0
        if constants.layer_norm:
            mean, grad_mean = _reduce_two(a, b, a_d, b_d)
            mean, grad_mean = mean / constants.C, grad_mean / constants.C
            a, b = tl.where(a_mask, a - mean, 0.0), tl.where(b_mask, b - mean, 0.0)
        square, projection = _reduce_two(a * a, b * b, a_d * a, b_d * b)
        rstd = 1.0 / tl.sqrt(square / constants.C + eps)
        a, b, projection = a * rstd, b * rstd, projection * rstd / constants.C
        a_sum += a_dn * a
        b_sum += b_dn * b
        a_dx, b_dx = rstd * (a_d - grad_mean - a * projection), rstd * (b_d - grad_mean - b * projection)
        if grads.dresidual is not None:
            a_dx, b_dx = a_dx + a_residual.to(tl.float32), b_dx + b_residual.to(tl.float32)
        _store_row(grads.dx, a_dx, row, first, a_mask, constants)
        _store_row(grads.dx, b_dx, row, second, b_mask, constants)
    if grads.partial is not None:
        at = grads.partial + tl.program_id(0) * constants.C
        tl.store(at + first, a_sum, mask=a_mask)
        tl.store(at + second, b_sum, mask=b_mask)


def _column_blocks(C: int) -> dict[str, int]:
    first, second = split_power_of_two(C)
    return {"FIRST": first, "SECOND": second} if second else {"FIRST": first // 2, "SECOND": first // 2}


def add_norm_shift(
    inputs: NormShiftInputs, outputs: NormShiftOutputs, layer_norm: bool, eps: float, shift_channels: tuple[int, int], fp8_max: float
) -> None:
    """Fill `made` from `given`, both of contiguous tensors; moved: channels from and to, of the token before."""
    B, T, C = inputs.x.shape
    constants = NormShiftConstants(C, layer_norm, *shift_channels, fp8_max, TOKENS_FORWARD)
    with torch.cuda.device_of(inputs.x):
        _add_norm_shift_kernel[(B * triton.cdiv(T, TOKENS_FORWARD),)](
            inputs, outputs, T, eps, constants, **_column_blocks(C), num_warps=WARPS
        )


def add_norm_shift_backward(
    x: Tensor, weight: Tensor | None, documents: Tensor | None, dy: Tensor, dresidual: Tensor | None, layer_norm: bool, eps: float,
    shift_channels: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x (B, T, C) and of the gain (C,), all of contiguous tensors."""
    B, T, C = x.shape
    programs = B * triton.cdiv(T, TOKENS_BACKWARD)
    dx = torch.empty_like(x)
    partial = None if weight is None else x.new_empty(programs, C, dtype=torch.float32)
    constants = NormShiftConstants(C, layer_norm, *shift_channels, 0.0, TOKENS_BACKWARD)
    grads = NormShiftGradients(x, weight, documents, dy, dresidual, dx, partial)
    with torch.cuda.device_of(x):
        _add_norm_shift_backward_kernel[(programs,)](
            grads, T, eps, constants, **_column_blocks(C), num_warps=WARPS_WIDE if C > WIDE_CHANNELS else WARPS
        )
    # One order of summation, whatever the order in which the blocks ran.
    return dx, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
