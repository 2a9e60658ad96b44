"""Linear layers in mixed-precision training: the weight is cast to 16 bits beforehand, and its gradient can be accumulated by the matmul.

A step of several micro-batches uses each weight, and adds to each gradient, once per micro-batch. With a weight that is cast once for
all of them, only 16 bits are read. A matmul that adds to its output (beta = 1 in BLAS) saves a pass that reads two float32
matrices and writes one. Gradients of float32 weights are float32 from the matmul on, where `nn.Linear` first rounds them to 16 bits.

Shapes: N tokens, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CastWeight(NamedTuple):
    """A weight (O, K) in the compute dtype, and where its gradient is accumulated."""

    rows: Tensor
    """(O, K) in 16 bits."""
    total: Tensor | None
    """(O, K), to which the gradient is added; None to return the gradient to autograd."""


def cast_linear(x: Tensor, weight: CastWeight, parameters: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., O) in the dtype of the weight; gradients are of first order.

    weight: the `parameters` (O_i, K) concatenated by rows; it may have more rows than they, of zeros.
    """
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _CastLinear.apply(flat, *weight, bias, *parameters)
    return out.view(*x.shape[:-1], -1)


class _CastLinear(torch.autograd.Function):
    """The matmuls are PyTorch's, so that activation checkpointing and torch.compile see them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: Tensor | None, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.dtype, x = x.dtype, x.to(rows.dtype)
        ctx.save_for_backward(x, rows)
        # Not a saved tensor: those must not be modified before they are read, and a layer may be used twice.
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
    """Views of `sizes` rows each (or columns, with another `dim`); padding at the end is left out."""
    return grad.split([*sizes, grad.shape[dim] - sum(sizes)], dim)[:-1]


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor | None:
    """dy^T x (O, K) in `dtype` for dy (N, O) and x (N, K); None if it was added to `total`."""
    if total is None:
        grad: Tensor = weight_grad_matmul(dy, x, dtype)
        return grad
    weight_grad_addmm(total, dy, x)
    return None


@torch.library.custom_op("andromeda::weight_gradient", mutates_args=(), device_types="cuda")
def weight_grad_matmul(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x in `dtype`; from 16 bits to float32 without rounding in between."""
    if dtype == torch.float32 and x.dtype != dtype:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T @ x).to(dtype)


@weight_grad_matmul.register_fake
def _(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


@torch.library.custom_op("andromeda::add_weight_gradient", mutates_args=("total",), device_types="cuda")
def weight_grad_addmm(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x to total (O, K), which is float32 or of the dtype of x."""
    if total.dtype == x.dtype:
        total.addmm_(dy.T, x)
    else:
        torch.addmm(total, dy.T, x, out_dtype=total.dtype, out=total)


@weight_grad_addmm.register_fake
def _(total: Tensor, dy: Tensor, x: Tensor) -> None:
    return None
