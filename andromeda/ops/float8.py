"""Training matmuls in float8: measuring, scaling, casting and multiplying.

Weights and activations are e4m3, gradients e5m2 (arXiv 2209.05433), with one scale per tensor. Both formats keep their relative
precision over many powers of two (e4m3 from 2^-6 to 448, e5m2 from 2^-14 to 57,344), so that a scale need not be computed from the
largest absolute value (amax): an upper bound ten times too large only costs some of the smallest values. The result of a matmul
can therefore be cast by the kernel that computes it, and needs no pass over the data for its amax (`ops/mlp.py`).

A scale is a power of two. Dividing by it is exact, and a weight that hardly changes is rounded to the same values again.

Shapes: N tokens, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops.activation import FLOAT8_DTYPE
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.float8_inference import ALIGNMENT
from andromeda.ops.master_weight_linear import split_parts

FORWARD_DTYPE, GRAD_DTYPE = FLOAT8_DTYPE, torch.float8_e5m2
MIN_AMAX = 1e-15
"""Lower limit of amax, so that the product of two scales does not underflow in float32."""
ROWS_PER_PARTIAL = 16
"""Rows that one partial result of `amax_and_norm_partials` covers."""
TRITON = find_spec("triton") is not None


class Float8Weight(NamedTuple):
    """A weight (O, K) in float8, as the forward and the backward pass read it."""

    rows: Tensor
    """(O, K)."""
    columns: Tensor
    """Transposed, (K, O)."""
    scale: Tensor
    """Scale that the weight was divided by, () in float32."""
    norms: Tensor
    """Largest L2 norm of a row, and of a rounded column, (2,) in float32."""


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels can be used for x."""
    return TRITON and x.is_cuda


def is_supported(x: Tensor) -> bool:
    """Whether matmuls of x (..., K) can be in float8: on a GPU, instead of bfloat16, with an aligned number of tokens."""
    tokens = x.numel() // max(1, x.shape[-1])
    return has_kernels(x) and compute_dtype(x) == torch.bfloat16 and tokens > 0 and tokens % ALIGNMENT == 0


def power_of_two_scale(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest powers of two such that values of up to `bound` (...) divided by them fit into `dtype`; 1 where the bound is zero."""
    bits = (bound.float().clamp(min=MIN_AMAX) / torch.finfo(dtype).max).view(torch.int32)
    # Rounds up to a power of two: any bit of the fraction carries into the exponent.
    scale = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(bound > 0, scale, 1.0)


def quantize_weight(weight: Tensor) -> Float8Weight:
    """weight (O, K) in float8. Also inside of compiled code, whose matmuls take no view of an operator's output for a scale."""
    return Float8Weight(*_quantize_weight_op(weight))


def quantize_weights(weights: Sequence[Tensor]) -> list[Float8Weight]:
    """Each of the weights (O, K) in float8."""
    *casts, scales, norms = _quantize_weights_op(list(weights))
    return [Float8Weight(*parts) for parts in zip(casts[::2], casts[1::2], scales[:, 0].unbind(), norms.unbind(), strict=True)]


@torch.library.custom_op("andromeda::quantize_weights", mutates_args=(), device_types="cuda")
def _quantize_weights_op(weights: list[Tensor]) -> list[Tensor]:
    """For each of L weights row-major and transposed, then scales in the first column of (L, 4), aligned to 16 bytes, and norms (L, 2).

    One operator for all weights, because a model has a hundred of them and launch overhead would dominate.
    """
    from andromeda.ops.triton import float8 as kernels

    largest, rows = torch.stack([kernels.amax_and_norm_partials(weight, ROWS_PER_PARTIAL).amax(1) for weight in weights]).unbind(1)
    scales = power_of_two_scale(largest, FORWARD_DTYPE)
    spread = F.pad(scales[:, None], (0, 3))
    casts: list[Tensor] = []
    for weight, row in zip(weights, spread.unbind(), strict=True):
        by_row, by_column, _ = kernels.cast_to_float8(weight, row[0], FORWARD_DTYPE)
        assert by_column is not None
        casts += [by_row, by_column]
    # Read from the float8 weight, a quarter of the bytes.
    columns = torch.stack([kernels.amax_and_norm_partials(part, ROWS_PER_PARTIAL)[1].amax() for part in casts[1::2]])
    return [*casts, spread, torch.stack([rows, columns * scales], 1)]


@torch.library.custom_op("andromeda::quantize_weight", mutates_args=())
def _quantize_weight_op(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One weight, in tensors of their own: row-major, transposed, scale (), norms (2,)."""
    rows, columns, scales, norms = _quantize_weights_op([weight])
    return rows, columns, scales[0, 0].clone(), norms[0].clone()


@_quantize_weight_op.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = (weight.new_empty(shape, dtype=FORWARD_DTYPE) for shape in (weight.shape, weight.shape[::-1]))
    return rows, columns, weight.new_empty((), dtype=torch.float32), weight.new_empty(2, dtype=torch.float32)


@_quantize_weights_op.register_fake
def _(weights: list[Tensor]) -> list[Tensor]:
    casts = [weight.new_empty(shape, dtype=FORWARD_DTYPE) for weight in weights for shape in (weight.shape, weight.shape[::-1])]
    return [*casts, *(weights[0].new_empty(len(weights), width, dtype=torch.float32) for width in (4, 2))]


def scaled_mm(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool) -> Tensor:
    """a (M, K) and b (N, K) in float8 with their scales -> a b^T (M, N) in `dtype`. fast: accumulate with reduced precision."""
    return torch._scaled_mm(a, b.T, *scales, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def weight_gradient(dy: Tensor, x: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """dy^T (O, N) and x^T (K, N) in float8 -> the weight gradient (O, K) in `dtype`, without rounding in between if float32."""
    out_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return scaled_mm(dy, x, scales, out_dtype, fast=False).to(dtype)


def amax_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) -> its largest absolute value () and the largest L2 norm of a row () in float32."""
    # Separate reductions, so that torch.compile fuses each with its consumer.
    largest, norm = amax_and_norm_partials(x).unbind()
    return largest.amax(), norm.amax()


@torch.library.custom_op("andromeda::amax_and_norm_partials", mutates_args=(), device_types="cuda")
def amax_and_norm_partials(x: Tensor) -> Tensor:
    """x (N, K) -> largest absolute value and largest L2 norm of a row in each group of ROWS_PER_PARTIAL rows, (2, groups) in float32."""
    from andromeda.ops.triton import float8 as kernels

    return kernels.amax_and_norm_partials(x.contiguous(), ROWS_PER_PARTIAL)


@amax_and_norm_partials.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(2, -(-x.shape[0] // ROWS_PER_PARTIAL), dtype=torch.float32)


@torch.library.custom_op("andromeda::cast_to_float8", mutates_args=(), device_types="cuda")
def cast_to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool, total: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, K) / scale () in float8 (N, K); transposed (K, N) if `columns`; the sum of x's rows (K,) in float32 if `total`."""
    from andromeda.ops.triton import float8 as kernels

    by_row, by_column, sums = kernels.cast_to_float8(x.contiguous(), scale, dtype, columns, total)
    return by_row, by_row.new_empty(0) if by_column is None else by_column, scale.new_empty(0) if sums is None else sums


@cast_to_float8.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool, total: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, K = x.shape
    transposed = x.new_empty((K, N) if columns else (0,), dtype=dtype)
    return x.new_empty(N, K, dtype=dtype), transposed, x.new_empty(K if total else 0, dtype=torch.float32)


def float8_linear(
    x: Tensor, weight: Float8Weight, parameters: Sequence[Tensor], bias: Tensor | None = None, bound: Tensor | None = None
) -> Tensor:
    """x (..., K) W^T + bias -> (..., O) in bfloat16; gradients are of first order.

    weight: the `parameters` (O_i, K) concatenated by rows, in float8; it may have more rows than they, of zeros. bound (): an
    upper bound on the absolute values of x; measured if None.
    """
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    out: Tensor = _Float8Linear.apply(flat, weight.rows, weight.columns, weight.scale, bound, bias, *parameters)
    return out.view(*x.shape[:-1], -1)


class _Float8Linear(torch.autograd.Function):
    """The matmuls are PyTorch's, so that activation checkpointing and torch.compile see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, scale: Tensor, bound: Tensor | None, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        x_scale = power_of_two_scale(amax_and_norm(x)[0] if bound is None else bound, FORWARD_DTYPE)
        x_rows, x_columns, _ = cast_to_float8(x, x_scale, FORWARD_DTYPE, any(ctx.needs_input_grad[6:]), False)
        ctx.save_for_backward(x_columns, x_scale, columns, scale)
        ctx.sizes, ctx.dtype = [p.shape[0] for p in parameters], parameters[0].dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        shift = None if bias is None else bias.to(torch.bfloat16)
        return scaled_mm(x_rows, rows, (x_scale, scale), torch.bfloat16, shift, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_scale, columns, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy_scale = power_of_two_scale(amax_and_norm(dy)[0], GRAD_DTYPE)
        dy_rows, dy_columns, total = cast_to_float8(dy, dy_scale, GRAD_DTYPE, any(needs[6:]), needs[5])
        dx = scaled_mm(dy_rows, columns, (dy_scale, scale), torch.bfloat16, fast=False) if needs[0] else None
        dw: tuple[Tensor | None, ...] = (None,) * len(ctx.sizes)
        if any(needs[6:]):
            grad = weight_gradient(dy_columns, x_columns, (dy_scale, x_scale), ctx.dtype)
            dw = split_parts(grad, ctx.sizes)
        return (dx, None, None, None, None, total.to(ctx.bias_dtype) if needs[5] else None, *dw)
