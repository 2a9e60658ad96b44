"""A feed-forward network W2 GELU(W1 x + b1) + b2 in 16-bit products on a GPU, as one step of the backward pass.

What a compiler makes of the parts reads the largest gradient of a layer once more to sum it up for b1, and rounds the gradients of
both matrices to 16 bits before it widens them again. Here GELU's own kernel sums b1's gradient as it goes, and the gradients of
float32 weights come from their products in float32. Kept for the backward pass are the input and W1 x; GELU is taken again.

Shapes: N tokens, C width, H inner width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops.compute_dtype import HALF_DTYPES, compute_dtype
from andromeda.ops.master_weight_linear import CastWeight, weight_gradient

TRITON = find_spec("triton") is not None


def is_supported(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `gelu_mlp` serves: gradients of plain tensors (not sharded ones) on a GPU, products in 16 bits."""
    return (
        TRITON
        and x.is_cuda
        and torch.is_grad_enabled()
        and compute_dtype(x) in HALF_DTYPES
        and all(type(p) in (Tensor, torch.nn.Parameter) and p.is_cuda for p in parameters)
    )


def gelu_mlp(x: Tensor, first: CastWeight, w1: Tensor, b1: Tensor, second: CastWeight, w2: Tensor, b2: Tensor) -> Tensor:
    """x (..., C), w1 (H, C), b1 (H,), w2 (C', H), b2 (C',) -> (..., C'), with the exact GELU; gradients are of first order.

    first, second: what was cast of w1 and w2, and where their gradients go.
    """
    out: Tensor = _GeluMlp.apply(x.reshape(-1, x.shape[-1]), *first, w1, b1, *second, w2, b2)
    return out.view(*x.shape[:-1], -1)


class _GeluMlp(torch.autograd.Function):
    """Products are PyTorch's, so that checkpointing and a compiler see them."""

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


@torch.library.custom_op("andromeda::gelu", mutates_args=(), device_types="cuda")
def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU(u + bias), the sum in float32; u (N, H) in 16 bits, bias (H,)."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu(u, bias)


@gelu.register_fake
def _(u: Tensor, bias: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("andromeda::gelu_gradients", mutates_args=(), device_types="cuda")
def gelu_gradients(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient by u (N, H) of what has the gradient da by GELU(u + bias); that GELU; and the gradient by the bias (H,) in float32."""
    from andromeda.ops.triton import gelu as kernels

    return kernels.gelu_backward(da, u, bias)


@gelu_gradients.register_fake
def _(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(u.shape[1:], dtype=torch.promote_types(u.dtype, torch.float32))
