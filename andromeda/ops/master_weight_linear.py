"""A linear layer in training with its products in 16 bits: its weight was cast before, and its gradient can be added up where it is kept.

A step of several micro-batches uses each weight as often, and adds up as many gradients. Cast once for all of them, the weight is read
in 16 bits alone; and a product that adds to what it writes (beta = 1 of BLAS) leaves out a pass that reads two float32 matrices and
writes one. Gradients of float32 weights are float32 from the product on, which PyTorch's own layer rounds to 16 bits first.

Shapes: N tokens, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CastWeight(NamedTuple):
    """A weight (O, K) as products read it, and where its gradient goes."""

    rows: Tensor
    """(O, K) in 16 bits."""
    total: Tensor | None
    """(O, K), to which the gradient is added; None where it is returned."""


def cast_linear(x: Tensor, weight: CastWeight, parameters: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., O) in the weight's type; gradients are of first order.

    weight is what was cast of the `parameters` (O_i, K), one below the other; it may have more rows than they, of zeros.
    """
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _CastLinear.apply(flat, *weight, bias, *parameters)
    return out.view(*x.shape[:-1], -1)


class _CastLinear(torch.autograd.Function):
    """Products are PyTorch's, so that checkpointing and a compiler see them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: Tensor | None, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.dtype, x = x.dtype, x.to(rows.dtype)
        ctx.save_for_backward(x, rows)
        # Not a saved tensor, which nothing may write to until its turn comes: a layer may be used twice.
        ctx.total = total
        ctx.sizes, ctx.weight_dtype = [p.shape[0] for p in parameters], parameters[0].dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return x @ rows.T if bias is None else torch.addmm(bias.to(rows.dtype), x, rows.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rows = ctx.saved_tensors
        needs, sizes = ctx.needs_input_grad, ctx.sizes
        dw: tuple[Tensor | None, ...] = (None,) * len(sizes)
        grad = weight_gradient(dy, x, ctx.weight_dtype, ctx.total) if any(needs[4:]) else None
        if grad is not None:
            dw = split_parts(grad, sizes)
        db = dy.sum(0, dtype=ctx.bias_dtype) if needs[3] else None
        return ((dy @ rows).to(ctx.dtype) if needs[0] else None, None, None, db, *dw)


def split_parts(grad: Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Views of so many rows each, or columns; what is left at the end belongs to nobody."""
    return grad.split([*sizes, grad.shape[dim] - sum(sizes)], dim)[:-1]


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor | None:
    """dY^T x (O, K) in `dtype` of dY (N, O) and x (N, K); None where it was added to `total`."""
    if total is None:
        grad: Tensor = weight_grad_matmul(dy, x, dtype)
        return grad
    weight_grad_addmm(total, dy, x)
    return None


@torch.library.custom_op("andromeda::weight_gradient", mutates_args=(), device_types="cuda")
def weight_grad_matmul(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dY^T x in `dtype`: of 16 bits into float32 without a rounding in between."""
    if dtype == torch.float32 and x.dtype != dtype:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T @ x).to(dtype)


@weight_grad_matmul.register_fake
def _(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


@torch.library.custom_op("andromeda::add_weight_gradient", mutates_args=("total",), device_types="cuda")
def weight_grad_addmm(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dY^T x to total (O, K), float32 or of the same type."""
    if total.dtype == x.dtype:
        total.addmm_(dy.T, x)
    else:
        torch.addmm(total, dy.T, x, out_dtype=total.dtype, out=total)


@weight_grad_addmm.register_fake
def _(total: Tensor, dy: Tensor, x: Tensor) -> None:
    return None
