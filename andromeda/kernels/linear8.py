"""A linear layer in training with its products in 8 bits, forward and backward.

The input is measured and cast once, for the forward product and, transposed, for the weight's gradient; so is the gradient that
comes from above. Kept for the backward pass is the transposed input, in 8 bits.

Shapes: N tokens, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.kernels.cast8 import GRADIENTS, VALUES, Weight8, cast, limits, product, scale_for, weight_gradient
from andromeda.kernels.linear16 import apart


def linear8(x: Tensor, weight: Weight8, parameters: Sequence[Tensor], bias: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias -> (..., O) in bfloat16; gradients are of first order.

    weight is what was cast of the `parameters` (O_i, K), one below the other; it may have more rows than they, of zeros.
    bound (): of x's values, which are measured otherwise.
    """
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    out: Tensor = _Linear.apply(flat, weight.rows, weight.columns, weight.scale, bound, bias, *parameters)
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """Products are PyTorch's, so that checkpointing and a compiler see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, scale: Tensor, bound: Tensor | None, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        x_scale = scale_for(limits(x)[0] if bound is None else bound, VALUES)
        x_rows, x_columns, _ = cast(x, x_scale, VALUES, any(ctx.needs_input_grad[6:]), False)
        ctx.save_for_backward(x_columns, x_scale, columns, scale)
        ctx.sizes, ctx.dtype = [p.shape[0] for p in parameters], parameters[0].dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        shift = None if bias is None else bias.to(torch.bfloat16)
        return product(x_rows, rows, (x_scale, scale), torch.bfloat16, shift, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_columns, x_scale, columns, scale = ctx.saved_tensors
        need = ctx.needs_input_grad
        dy_scale = scale_for(limits(dy)[0], GRADIENTS)
        dy_rows, dy_columns, total = cast(dy, dy_scale, GRADIENTS, any(need[6:]), need[5])
        dx = product(dy_rows, columns, (dy_scale, scale), torch.bfloat16, fast=False) if need[0] else None
        dw: tuple[Tensor | None, ...] = (None,) * len(ctx.sizes)
        if any(need[6:]):
            whole = weight_gradient(dy_columns, x_columns, (dy_scale, x_scale), ctx.dtype)
            dw = apart(whole, ctx.sizes)
        return (dx, None, None, None, None, total.to(ctx.bias_dtype) if need[5] else None, *dw)
