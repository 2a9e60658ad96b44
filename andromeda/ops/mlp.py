"""A feed-forward network W2 GELU(W1 x + b1) + b2 on a GPU as one autograd function, with 16-bit or float8 matmuls.

16 bits: torch.compile reads the largest gradient of a layer a second time to sum the gradient of b1, and rounds the gradients of
both weights to 16 bits before it converts them to float32. Here the GELU kernel sums b1's gradient in the same pass, and the
gradients of float32 weights leave their matmuls in float32. Saved for backward are the input and W1 x; GELU is recomputed.

float8: the inner activations are the largest tensors of a layer. Their largest absolute values need not be searched for: they
are bounded by norms that are known before the matmuls (Cauchy-Schwarz), so that the GELU kernels write float8 directly.

    |W1 x + b1| <= max_i |x_i| max_j |W1_j| + max |b1|      x_i: tokens, W1_j: rows of the weight; |GELU(u)| <= |u|
    |dy W2|     <= max_i |dy_i| max_j |W2^j|                W2^j: columns of the weight; |GELU'(u)| <= 1.13

The margins cover the rounding of the factors, by up to 1/16 in e4m3 and 1/8 in e5m2. Saved for backward are the transposed
input in float8 and W1 x.

Shapes: N tokens, C width, H inner width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops import float8
from andromeda.ops.compute_dtype import HALF_DTYPES, compute_dtype
from andromeda.ops.float8 import FORWARD_DTYPE, GRAD_DTYPE, Float8Weight, amax_and_norm, cast_to_float8, power_of_two_scale, scaled_mm
from andromeda.ops.master_weight_linear import CastWeight, weight_gradient

TRITON = find_spec("triton") is not None
FORWARD_MARGIN, BACKWARD_MARGIN = 1.25, 1.5
"""Margins of the float8 bounds: above (17/16)^2, and above 9/8 * 17/16 * 1.13."""


def is_supported(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `gelu_mlp` can be used: on a GPU, with gradients, matmuls in 16 bits, and plain (not sharded) parameters."""
    return (
        TRITON
        and x.is_cuda
        and torch.is_grad_enabled()
        and compute_dtype(x) in HALF_DTYPES
        and all(type(p) in (Tensor, torch.nn.Parameter) and p.is_cuda for p in parameters)
    )


def gelu_mlp(x: Tensor, first: CastWeight, w1: Tensor, b1: Tensor, second: CastWeight, w2: Tensor, b2: Tensor) -> Tensor:
    """x (..., C), w1 (H, C), b1 (H,), w2 (C', H), b2 (C',) -> (..., C') with the exact GELU; gradients are of first order.

    first, second: w1 and w2 in the compute dtype, and where their gradients are accumulated.
    """
    out: Tensor = _GeluMlp.apply(x.reshape(-1, x.shape[-1]), *first, w1, b1, *second, w2, b2)
    return out.view(*x.shape[:-1], -1)


def gelu_mlp_fp8(
    x: Tensor, first: Float8Weight, w1: Tensor, b1: Tensor, second: Float8Weight, w2: Tensor, b2: Tensor, bound: Tensor | None = None
) -> Tensor:
    """x (..., C), w1 (H, C), b1 (H,), w2 (C', H), b2 (C',) -> (..., C') in bfloat16 with the exact GELU; gradients are of first order.

    first, second: w1 and w2 in float8. bound (): an upper bound on the L2 norms of x's rows; measured if None.
    """
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    out: Tensor = _GeluMlpFp8.apply(flat, *first, w1, b1, *second, w2, b2, bound)
    return out.view(*x.shape[:-1], -1)


class _GeluMlp(torch.autograd.Function):
    """The matmuls are PyTorch's, so that activation checkpointing and torch.compile see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows1: Tensor, total1: Tensor | None, w1: Tensor, b1: Tensor,
        rows2: Tensor, total2: Tensor | None, w2: Tensor, b2: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = x.dtype, w1.dtype, b1.dtype, w2.dtype, b2.dtype
        x = x.to(rows1.dtype)
        u = x @ rows1.T
        ctx.save_for_backward(x, u, rows1, b1, rows2)
        ctx.totals = total1, total2
        return torch.addmm(b2.to(u.dtype), gelu(u, b1), rows2.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, rows1, b1, rows2 = ctx.saved_tensors
        dtype, w1_dtype, b1_dtype, w2_dtype, b2_dtype = ctx.dtypes
        dy = dy.to(u.dtype)
        du, a, d_b1 = gelu_gradients(dy @ rows2, u, b1)
        needs = ctx.needs_input_grad
        return (
            (du @ rows1).to(dtype) if needs[0] else None,
            None,
            None,
            weight_gradient(du, x, w1_dtype, ctx.totals[0]) if needs[3] else None,
            d_b1.to(b1_dtype) if needs[4] else None,
            None,
            None,
            weight_gradient(dy, a, w2_dtype, ctx.totals[1]) if needs[7] else None,
            dy.sum(0, dtype=d_b1.dtype).to(b2_dtype) if needs[8] else None,
        )


class _GeluMlpFp8(torch.autograd.Function):
    """The matmuls are PyTorch's, so that activation checkpointing and torch.compile see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows1: Tensor, columns1: Tensor, scale1: Tensor, norms1: Tensor, w1: Tensor, b1: Tensor,
        rows2: Tensor, columns2: Tensor, scale2: Tensor, norms2: Tensor, w2: Tensor, b2: Tensor, bound: Tensor | None,
    ) -> Tensor:  # fmt: skip
        amax, norm = amax_and_norm(x) if bound is None else (bound, bound)
        x_scale = power_of_two_scale(amax, FORWARD_DTYPE)
        x_rows, x_columns, _ = cast_to_float8(x, x_scale, FORWARD_DTYPE, ctx.needs_input_grad[5], False)
        u = scaled_mm(x_rows, rows1, (x_scale, scale1), torch.bfloat16, fast=True)
        a_scale = power_of_two_scale(FORWARD_MARGIN * norm * norms1[0] + b1.abs().amax(), FORWARD_DTYPE)
        ctx.save_for_backward(x_columns, x_scale, u, b1, a_scale, columns1, scale1, columns2, scale2, norms2)
        ctx.dtypes = w1.dtype, b1.dtype, w2.dtype, b2.dtype
        return scaled_mm(gelu_fp8(u, b1, a_scale), rows2, (a_scale, scale2), torch.bfloat16, b2.to(torch.bfloat16), fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_scale, u, b1, a_scale, columns1, scale1, columns2, scale2, norms2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        w1_dtype, b1_dtype, w2_dtype, b2_dtype = ctx.dtypes
        amax, norm = amax_and_norm(dy)
        dy_scale = power_of_two_scale(amax, GRAD_DTYPE)
        dy_rows, dy_columns, d_b2 = cast_to_float8(dy, dy_scale, GRAD_DTYPE, needs[11], needs[12])
        da = scaled_mm(dy_rows, columns2, (dy_scale, scale2), torch.bfloat16, fast=False)
        du_scale = power_of_two_scale(BACKWARD_MARGIN * norm * norms2[1], GRAD_DTYPE)
        du_rows, du_columns, a_columns, d_b1 = gelu_fp8_gradients(da, u, b1, a_scale, du_scale)
        return (
            scaled_mm(du_rows, columns1, (du_scale, scale1), torch.bfloat16, fast=False) if needs[0] else None,
            *[None] * 4,
            float8.weight_gradient(du_columns, x_columns, (du_scale, x_scale), w1_dtype) if needs[5] else None,
            d_b1.to(b1_dtype) if needs[6] else None,
            *[None] * 4,
            float8.weight_gradient(dy_columns, a_columns, (dy_scale, a_scale), w2_dtype) if needs[11] else None,
            d_b2.to(b2_dtype) if needs[12] else None,
            None,
        )


@torch.library.custom_op("andromeda::gelu", mutates_args=(), device_types="cuda")
def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU(u + bias) with the sum in float32; u (N, H) in 16 bits, bias (H,)."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu(u, bias)


@gelu.register_fake
def _(u: Tensor, bias: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("andromeda::gelu_gradients", mutates_args=(), device_types="cuda")
def gelu_gradients(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient da (N, H) of a = GELU(u + bias): the gradient of u (N, H), a, and the gradient of the bias (H,) in float32."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu_backward(da, u, bias)


@gelu_gradients.register_fake
def _(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(u.shape[1:], dtype=torch.promote_types(u.dtype, torch.float32))


@torch.library.custom_op("andromeda::gelu_fp8", mutates_args=(), device_types="cuda")
def gelu_fp8(u: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """GELU(u + bias) / scale in e4m3 (N, H); scale ()."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu_fp8(u.contiguous(), bias, scale, FORWARD_DTYPE)


@gelu_fp8.register_fake
def _(u: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return u.new_empty(u.shape, dtype=FORWARD_DTYPE)


@torch.library.custom_op("andromeda::gelu_fp8_gradients", mutates_args=(), device_types="cuda")
def gelu_fp8_gradients(da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, du_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient da of a = GELU(u + bias): du (N, H) and du^T (H, N) in e5m2, a^T (H, N) in e4m3, the bias gradient (H,)."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu_fp8_backward(da.contiguous(), u.contiguous(), bias, a_scale, du_scale, FORWARD_DTYPE, GRAD_DTYPE)


@gelu_fp8_gradients.register_fake
def _(da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, du_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H = u.shape
    du, du_t = u.new_empty(N, H, dtype=GRAD_DTYPE), u.new_empty(H, N, dtype=GRAD_DTYPE)
    return du, du_t, u.new_empty(H, N, dtype=FORWARD_DTYPE), u.new_empty(H, dtype=torch.float32)
