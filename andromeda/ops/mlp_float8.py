"""A feed-forward network W2 GELU(W1 x + b1) + b2 in 8-bit products, forward and backward, with no pass that only casts inside.

The inner activations are the largest of a layer, and their largest values need not be looked for: they are bounded by norms that
are known before the products are taken (Cauchy-Schwarz), and GELU's kernels write 8 bits at once.

    |W1 x + b1| <= max_i |x_i| max_j |W1_j| + max |b1|      rows x_i of tokens, W1_j of the weight; |GELU(u)| <= |u|
    |dy W2|     <= max_i |dy_i| max_j |W2^j|                columns W2^j of the weight; |GELU'(u)| <= 1.13

Factors are rounded before they are multiplied, by up to 1/16 of themselves in e4m3 and 1/8 in e5m2, which the margins cover.
Kept for the backward pass are the transposed input in 8 bits and W1 x; GELU is taken again.

Shapes: N tokens, C width, H inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops.float8 import (
    FORWARD_DTYPE,
    GRAD_DTYPE,
    Float8Weight,
    amax_and_norm,
    cast_to_float8,
    power_of_two_scale,
    scaled_mm,
    weight_gradient,
)

FORWARD_MARGIN, BACKWARD_MARGIN = 1.25, 1.5
"""Margins of the bounds: above (17/16)^2, and above 9/8 * 17/16 * 1.13."""


def gelu_mlp_fp8(
    x: Tensor, first: Float8Weight, w1: Tensor, b1: Tensor, second: Float8Weight, w2: Tensor, b2: Tensor, bound: Tensor | None = None
) -> Tensor:
    """x (..., C), w1 (H, C), b1 (H,), w2 (C', H), b2 (C',) -> (..., C') in bfloat16, with the exact GELU; gradients of first order.

    first, second: what was cast of w1 and w2. bound (): of the norms of x's rows, which are measured otherwise.
    """
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    out: Tensor = _GeluMlpFp8.apply(flat, *first, w1, b1, *second, w2, b2, bound)
    return out.view(*x.shape[:-1], -1)


class _GeluMlpFp8(torch.autograd.Function):
    """Products are PyTorch's, so that checkpointing and a compiler see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows1: Tensor, columns1: Tensor, scale1: Tensor, norms1: Tensor, w1: Tensor, b1: Tensor,
        rows2: Tensor, columns2: Tensor, scale2: Tensor, norms2: Tensor, w2: Tensor, b2: Tensor, bound: Tensor | None,
    ) -> Tensor:  # fmt: skip
        largest, norm = amax_and_norm(x) if bound is None else (bound, bound)
        x_scale = power_of_two_scale(largest, FORWARD_DTYPE)
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
        largest, norm = amax_and_norm(dy)
        dy_scale = power_of_two_scale(largest, GRAD_DTYPE)
        dy_rows, dy_columns, d_b2 = cast_to_float8(dy, dy_scale, GRAD_DTYPE, needs[11], needs[12])
        da = scaled_mm(dy_rows, columns2, (dy_scale, scale2), torch.bfloat16, fast=False)
        du_scale = power_of_two_scale(BACKWARD_MARGIN * norm * norms2[1], GRAD_DTYPE)
        du_rows, du_columns, a_columns, d_b1 = gelu_fp8_gradients(da, u, b1, a_scale, du_scale)
        return (
            scaled_mm(du_rows, columns1, (du_scale, scale1), torch.bfloat16, fast=False) if needs[0] else None,
            *[None] * 4,
            weight_gradient(du_columns, x_columns, (du_scale, x_scale), w1_dtype) if needs[5] else None,
            d_b1.to(b1_dtype) if needs[6] else None,
            *[None] * 4,
            weight_gradient(dy_columns, a_columns, (dy_scale, a_scale), w2_dtype) if needs[11] else None,
            d_b2.to(b2_dtype) if needs[12] else None,
            None,
        )


@torch.library.custom_op("andromeda::gelu8", mutates_args=(), device_types="cuda")
def gelu_fp8(u: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """GELU(u + bias) over scale () in e4m3 (N, H)."""
    from andromeda.ops.triton import gelu_float8 as kernels

    return kernels.gelu_fp8(u.contiguous(), bias, scale, FORWARD_DTYPE)


@gelu_fp8.register_fake
def _(u: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return u.new_empty(u.shape, dtype=FORWARD_DTYPE)


@torch.library.custom_op("andromeda::gelu8_gradients", mutates_args=(), device_types="cuda")
def gelu_fp8_gradients(da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, du_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a = GELU(u + bias) with the gradient da: du (N, H) and du^T (H, N) in e5m2, a^T (H, N) in e4m3, the bias's gradient (H,)."""
    from andromeda.ops.triton import gelu_float8 as kernels

    return kernels.gelu_fp8_backward(da.contiguous(), u.contiguous(), bias, a_scale, du_scale, FORWARD_DTYPE, GRAD_DTYPE)


@gelu_fp8_gradients.register_fake
def _(da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, du_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H = u.shape
    du, du_t = u.new_empty(N, H, dtype=GRAD_DTYPE), u.new_empty(H, N, dtype=GRAD_DTYPE)
    return du, du_t, u.new_empty(H, N, dtype=FORWARD_DTYPE), u.new_empty(H, dtype=torch.float32)
