"""Triton kernels for everything between two matmuls of a layer: residual add, norm, token shift and float8, in one read and one write.

A program computes some tokens of one sequence, one after the other, and keeps the normalized vector of the previous token in
registers for the channels that token shift takes from it. A vector is held as two blocks (`activation.split_power_of_two`); in
the names below, a and b are their values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import row_scale, split_power_of_two

TOKENS_FORWARD, TOKENS_BACKWARD, WARPS = 8, 32, 4
"""Tokens of a program, and its warps. In the backward pass each program writes a partial sum of the gain's gradient."""
WIDE_CHANNELS, WARPS_WIDE = 2048, 8
"""Above this width the backward pass, which holds several vectors in registers, needs more warps."""


class NormShiftConstants(NamedTuple):
    """Values that are known when a kernel is compiled."""

    C: int
    """Channels."""
    layer_norm: bool
    """Layer norm, otherwise RMS norm."""
    shift_begin: int
    """Channels `shift_begin` to `shift_end` come from the previous token."""
    shift_end: int
    fp8_max: float
    """Largest value of the float8 dtype; 0 leaves y unquantized."""
    tokens: int
    """Tokens of a program."""


class NormShiftInputs(NamedTuple):
    """What the forward kernel reads; None where absent."""

    x: Any
    """(B, T, C)."""
    delta: Any
    """Added to x first (B, T, C)."""
    weight: Any
    """Gain (C,)."""
    bias: Any
    """Added to the residual stream that is stored, but not to what is normalized (C,)."""
    past: Any
    """Normalized vector before the first token (B, C)."""
    documents: Any
    """Document numbers (B, T): the first token of a document gets zeros from the previous token."""


class NormShiftOutputs(NamedTuple):
    """What the forward kernel writes; None where absent."""

    y: Any
    """(B, T, C)."""
    scales: Any
    """What each row of y was divided by (B, T)."""
    residual: Any
    """x + delta + bias (B, T, C)."""
    last: Any
    """Normalized vector of the last token (B, C)."""


@triton.jit
def _load_sum(inputs, outputs, row, column, mask, STORE: tl.constexpr, constants: tl.constexpr):
    """x + delta of a row, rounded to the dtype in which it is stored; with STORE also stored."""
    offsets = row * constants.C + column
    dtype: tl.constexpr = inputs.x.dtype.element_ty
    value = tl.load(inputs.x + offsets, mask=mask, other=0.0).to(tl.float32)
    if inputs.delta is not None:
        value += tl.load(inputs.delta + offsets, mask=mask, other=0.0).to(tl.float32)
    if STORE and outputs.residual is not None:
        stored = value
        if inputs.bias is not None:
            stored += tl.load(inputs.bias + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(outputs.residual + offsets, stored.to(dtype), mask=mask)
    return value.to(dtype).to(tl.float32)


@triton.jit
def _normalize_row(a, b, a_mask, b_mask, eps, constants: tl.constexpr):
    """Both blocks normalized, without the gain, and the inverse standard deviation or RMS."""
    if constants.layer_norm:
        mean = (tl.sum(a, 0) + tl.sum(b, 0)) / constants.C
        a, b = tl.where(a_mask, a - mean, 0.0), tl.where(b_mask, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / constants.C + eps)
    return a * rstd, b * rstd, rstd


@triton.jit
def _apply_gain(args, value, column, mask):
    """value times the gain `args.weight`, if there is one."""
    if args.weight is not None:
        value *= tl.load(args.weight + column, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _apply_gain_and_round(inputs, value, column, mask):
    """The same, rounded to the dtype of x."""
    return _apply_gain(inputs, value, column, mask).to(inputs.x.dtype.element_ty).to(tl.float32)


@triton.jit
def _normalized_row(inputs, outputs, row, eps, first, second, STORE: tl.constexpr, constants: tl.constexpr):
    """Both blocks of a row's normalized vector."""
    a_mask, b_mask = first < constants.C, second < constants.C
    a = _load_sum(inputs, outputs, row, first, a_mask, STORE, constants)
    b = _load_sum(inputs, outputs, row, second, b_mask, STORE, constants)
    a, b, _ = _normalize_row(a, b, a_mask, b_mask, eps, constants)
    return _apply_gain_and_round(inputs, a, first, a_mask), _apply_gain_and_round(inputs, b, second, b_mask)


@triton.jit
def _is_shifted(column, constants: tl.constexpr):
    """Which channels come from the previous token."""
    return (column >= constants.shift_begin) & (column < constants.shift_end)


@triton.jit
def _same_document(documents, row, has_previous):
    """1.0 where the previous token belongs to the same document, or where there is none; otherwise 0.0."""
    same = 1.0
    if documents is not None:
        previous = tl.load(documents + row - 1, mask=has_previous, other=0)
        same = tl.where(has_previous & (tl.load(documents + row) != previous), 0.0, 1.0)
    return same


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
    a_previous, b_previous = tl.zeros((FIRST,), tl.float32), tl.zeros((SECOND,), tl.float32)
    if constants.shift_end > constants.shift_begin:
        if start == 0:
            past = inputs.past + batch * constants.C
            a_previous = tl.load(past + first, mask=first < constants.C, other=0.0).to(tl.float32)
            b_previous = tl.load(past + second, mask=second < constants.C, other=0.0).to(tl.float32)
        else:
            a_previous, b_previous = _normalized_row(inputs, outputs, base + start - 1, eps, first, second, False, constants)
    for token in range(start, min(start + constants.tokens, T)):
        row = base + token
        a, b = _normalized_row(inputs, outputs, row, eps, first, second, True, constants)
        y_a, y_b = a, b
        if constants.shift_end > constants.shift_begin:
            same = _same_document(inputs.documents, row, token > 0)
            y_a = tl.where(_is_shifted(first, constants), a_previous * same, a)
            y_b = tl.where(_is_shifted(second, constants), b_previous * same, b)
            a_previous, b_previous = a, b
        inverse = 1.0
        if constants.fp8_max > 0:
            scale = row_scale(tl.maximum(tl.max(tl.abs(y_a), 0), tl.max(tl.abs(y_b), 0)), constants.fp8_max)
            tl.store(outputs.scales + row, scale)
            inverse = 1.0 / scale
        _store_output(outputs, row, first, y_a, inverse, constants)
        _store_output(outputs, row, second, y_b, inverse, constants)
    if outputs.last is not None:  # noqa: SIM102 - the first condition is known at compile time, the second is not
        if start + constants.tokens >= T:
            dtype: tl.constexpr = outputs.last.dtype.element_ty
            tl.store(outputs.last + batch * constants.C + first, a_previous.to(dtype), mask=first < constants.C)
            tl.store(outputs.last + batch * constants.C + second, b_previous.to(dtype), mask=second < constants.C)


class NormShiftGradients(NamedTuple):
    """What the backward kernel reads and writes; None where absent."""

    x: Any
    """What was normalized (B, T, C)."""
    weight: Any
    documents: Any
    dy: Any
    dresidual: Any
    """Gradient of the residual stream that the forward pass returned (B, T, C)."""
    dx: Any
    partial: Any
    """Gradient of the gain, one row per program (programs, C)."""


@triton.jit
def _add_pairs(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _reduce_two(a, b, c, d):
    """sum(a) + sum(b) and sum(c) + sum(d): reduced in pairs, so that the warps synchronize once for both."""
    first_ab, first_cd = tl.reduce((a, c), 0, _add_pairs)
    second_ab, second_cd = tl.reduce((b, d), 0, _add_pairs)
    return first_ab + second_ab, first_cd + second_cd


@triton.jit
def _load_row(x, row, column, mask, constants: tl.constexpr):
    """Channels of a row in the dtype in which they are stored."""
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
    # Rows are loaded one token ahead, so that a program does not wait for memory and for its reductions in turn. Until they are
    # used they stay in their storage dtype, which takes half the registers in 16 bits.
    row_begin, row_end, sequence_end = base + start, base + min(start + constants.tokens, T), base + T
    has_dy = row_begin + 1 < sequence_end
    a_dy_next = _load_row(grads.dy, row_begin + 1, first, a_mask & has_dy, constants)
    b_dy_next = _load_row(grads.dy, row_begin + 1, second, b_mask & has_dy, constants)
    a_dy, b_dy = _load_row(grads.dy, row_begin, first, a_mask, constants), _load_row(grads.dy, row_begin, second, b_mask, constants)
    a_x, b_x = _load_row(grads.x, row_begin, first, a_mask, constants), _load_row(grads.x, row_begin, second, b_mask, constants)
    for row in range(row_begin, row_end):
        a, b = a_x.to(tl.float32), b_x.to(tl.float32)
        has_x, has_dy = row + 1 < row_end, row + 2 < tl.minimum(row_end + 1, sequence_end)
        a_dy_loaded = _load_row(grads.dy, row + 2, first, a_mask & has_dy, constants)
        b_dy_loaded = _load_row(grads.dy, row + 2, second, b_mask & has_dy, constants)
        a_x = _load_row(grads.x, row + 1, first, a_mask & has_x, constants)
        b_x = _load_row(grads.x, row + 1, second, b_mask & has_x, constants)
        if grads.dresidual is not None:
            a_dresidual = _load_row(grads.dresidual, row, first, a_mask, constants)
            b_dresidual = _load_row(grads.dresidual, row, second, b_mask, constants)
        a_dn, b_dn = a_dy.to(tl.float32), b_dy.to(tl.float32)
        if constants.shift_end > constants.shift_begin:
            # The shifted channels of this token were read by the next token.
            same = _same_document(grads.documents, tl.minimum(row + 1, sequence_end - 1), row + 1 < sequence_end)
            a_dn = tl.where(_is_shifted(first, constants), a_dy_next.to(tl.float32) * same, a_dn)
            b_dn = tl.where(_is_shifted(second, constants), b_dy_next.to(tl.float32) * same, b_dn)
        a_dy, b_dy, a_dy_next, b_dy_next = a_dy_next, b_dy_next, a_dy_loaded, b_dy_loaded
        a_d, b_d = _apply_gain(grads, a_dn, first, a_mask), _apply_gain(grads, b_dn, second, b_mask)
        mean_d = 0.0
        if constants.layer_norm:
            mean, mean_d = _reduce_two(a, b, a_d, b_d)
            mean, mean_d = mean / constants.C, mean_d / constants.C
            a, b = tl.where(a_mask, a - mean, 0.0), tl.where(b_mask, b - mean, 0.0)
        square, projection = _reduce_two(a * a, b * b, a_d * a, b_d * b)
        rstd = 1.0 / tl.sqrt(square / constants.C + eps)
        a, b, projection = a * rstd, b * rstd, projection * rstd / constants.C
        a_sum += a_dn * a
        b_sum += b_dn * b
        a_dx, b_dx = rstd * (a_d - mean_d - a * projection), rstd * (b_d - mean_d - b * projection)
        if grads.dresidual is not None:
            a_dx, b_dx = a_dx + a_dresidual.to(tl.float32), b_dx + b_dresidual.to(tl.float32)
        _store_row(grads.dx, a_dx, row, first, a_mask, constants)
        _store_row(grads.dx, b_dx, row, second, b_mask, constants)
    if grads.partial is not None:
        partial = grads.partial + tl.program_id(0) * constants.C
        tl.store(partial + first, a_sum, mask=a_mask)
        tl.store(partial + second, b_sum, mask=b_mask)


def _column_blocks(C: int) -> dict[str, int]:
    first, second = split_power_of_two(C)
    return {"FIRST": first, "SECOND": second} if second else {"FIRST": first // 2, "SECOND": first // 2}


def add_norm_shift(
    inputs: NormShiftInputs, outputs: NormShiftOutputs, layer_norm: bool, eps: float, shift_channels: tuple[int, int], fp8_max: float
) -> None:
    """Compute `outputs` from `inputs`, all contiguous. shift_channels: first and last (exclusive) channel of the token shift."""
    B, T, C = inputs.x.shape
    constants = NormShiftConstants(C, layer_norm, *shift_channels, fp8_max, TOKENS_FORWARD)
    with torch.cuda.device_of(inputs.x):
        _add_norm_shift_kernel[(B * triton.cdiv(T, TOKENS_FORWARD),)](
            inputs, outputs, T, eps, constants, **_column_blocks(C), num_warps=WARPS
        )


def add_norm_shift_backward(
    x: Tensor,
    weight: Tensor | None,
    documents: Tensor | None,
    dy: Tensor,
    dresidual: Tensor | None,
    layer_norm: bool,
    eps: float,
    shift_channels: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (B, T, C), which was normalized, and of the gain (C,). All tensors are contiguous."""
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
    # Summed in one fixed order, so that the gradient is deterministic.
    return dx, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
