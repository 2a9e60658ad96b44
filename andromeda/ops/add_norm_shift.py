"""Residual add, norm, token shift and optional quantization to float8 in one kernel: everything between two matmuls of a layer.

Each of these alone reads and writes all activations once. The reference are the model's own parts, one after the other
(`model/add_norm_shift.py`).

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops.activation import FLOAT8_DTYPE, FLOAT8_MAX

TRITON = find_spec("triton") is not None
MAX_CHANNELS = 8192
"""Most channels that a program can hold in registers."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class AddNormShiftOutput(NamedTuple):
    """Results of `add_norm_shift`."""

    y: Tensor
    """(B, T, C) in the dtype of x, or in float8."""
    scale: Tensor
    """Scale that each row of y was divided by (B T, 1) in float32; empty without float8."""
    residual: Tensor
    """x + delta + bias (B, T, C); x itself where neither was given."""
    last: Tensor
    """Normalized vector of the last token (B, 1, C), the token shift's state for the next pass; empty without token shift."""


def is_supported(x: Tensor) -> bool:
    """Whether the kernel can compute this: x (..., C) on a GPU, in 32 or 16 bits, not sharded."""
    return TRITON and x.is_cuda and type(x) is Tensor and x.shape[-1] <= MAX_CHANNELS and x.dtype in DTYPES


def add_norm_shift(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    past: Tensor | None,
    documents: Tensor | None = None,
    *,
    layer_norm: bool,
    eps: float,
    shift_channels: tuple[int, int] = (0, 0),
    fp8: bool = False,
) -> AddNormShiftOutput:
    """Norm of x + delta (B, T, C) with gain `weight` (C,); channels in range(*shift_channels) come from the previous token.

    layer_norm: layer norm without a bias, otherwise RMS norm. bias (C,): added to the residual stream that is returned, not to
    what is normalized. past (B, 1, C): the normalized vector before the first token, required with token shift. documents (B, T):
    document numbers, across whose boundaries no channel is shifted. fp8: quantize y with a scale per row. Without bias and
    fp8, gradients reach x, delta and weight, and are deterministic.
    """
    if delta is None and bias is None and not fp8 and torch.is_grad_enabled() and x.requires_grad:
        y, residual, last = _NormShiftPassThrough.apply(x, weight, past, documents, layer_norm, eps, *shift_channels)
        return AddNormShiftOutput(y, x.new_empty(0, 1, dtype=torch.float32), residual, last)
    output = AddNormShiftOutput(*_add_norm_shift_op(x, delta, weight, bias, past, documents, layer_norm, eps, *shift_channels, fp8))
    return output._replace(residual=x) if delta is None and bias is None else output


class _NormShiftPassThrough(torch.autograd.Function):
    """The norm of x, and x itself as a second output, whose gradient the kernel adds to that of the norm.

    Otherwise autograd would read and write the gradient of x once more to add them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, past: Tensor | None, documents: Tensor | None, layer_norm: bool, eps: float,
        shift_begin: int, shift_end: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y, _, _, last = _add_norm_shift_op(x, None, weight, None, past, documents, layer_norm, eps, shift_begin, shift_end, False)
        ctx.save_for_backward(x, weight, documents)
        ctx.form = layer_norm, eps, shift_begin, shift_end
        return y, x.view_as(x), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dx: Tensor, _: Tensor) -> tuple[Any, ...]:
        x, weight, documents = ctx.saved_tensors
        dx, dweight = _gradients(x, weight, documents, dy, dx, *ctx.form)
        return (dx, None if weight is None else dweight, *[None] * 6)


@torch.library.custom_op("andromeda::add_norm_shift", mutates_args=())
def _add_norm_shift_op(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    past: Tensor | None,
    documents: Tensor | None,
    layer_norm: bool,
    eps: float,
    shift_begin: int,
    shift_end: int,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from andromeda.ops.triton import add_norm_shift as kernels

    inputs = kernels.NormShiftInputs(*(None if t is None else t.contiguous() for t in (x, delta, weight, bias, past, documents)))
    output = _empty_output(x, delta, bias, shift_begin, shift_end, fp8)
    outputs = kernels.NormShiftOutputs(*(t if t.numel() else None for t in output))
    kernels.add_norm_shift(inputs, outputs, layer_norm, eps, (shift_begin, shift_end), FLOAT8_MAX if fp8 else 0.0)
    return output.y, output.scale, output.residual, output.last


def _empty_output(x: Tensor, delta: Tensor | None, bias: Tensor | None, shift_begin: int, shift_end: int, fp8: bool) -> AddNormShiftOutput:
    B, T, C = x.shape
    y = x.new_empty(B, T, C, dtype=FLOAT8_DTYPE if fp8 else x.dtype)
    scale = x.new_empty(B * T if fp8 else 0, 1, dtype=torch.float32)
    residual = x.new_empty(0) if delta is None and bias is None else x.new_empty(B, T, C)
    return AddNormShiftOutput(y, scale, residual, x.new_empty(B, 1, C) if shift_end > shift_begin else x.new_empty(0))


@_add_norm_shift_op.register_fake
def _(
    x: Tensor, delta: Any, weight: Any, bias: Any, past: Any, documents: Any, layer_norm: bool, eps: float,
    shift_begin: int, shift_end: int, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    output = _empty_output(x, delta, bias, shift_begin, shift_end, fp8)
    return output.y, output.scale, output.residual, output.last


@torch.library.custom_op("andromeda::add_norm_shift_backward", mutates_args=())
def _gradients(
    x: Tensor, weight: Tensor | None, documents: Tensor | None, dy: Tensor, dresidual: Tensor | None, layer_norm: bool, eps: float,
    shift_begin: int, shift_end: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of what was normalized (B, T, C) and of the gain (C,), empty without a gain."""
    from andromeda.ops.triton import add_norm_shift as kernels

    x, dy = x.contiguous(), dy.contiguous()
    dresidual = None if dresidual is None else dresidual.contiguous()
    documents = None if documents is None else documents.contiguous()
    dx, dweight = kernels.add_norm_shift_backward(x, weight, documents, dy, dresidual, layer_norm, eps, (shift_begin, shift_end))
    return dx, x.new_empty(0) if dweight is None else dweight


@_gradients.register_fake
def _(
    x: Tensor, weight: Any, documents: Any, dy: Any, dresidual: Any, layer_norm: bool, eps: float, shift_begin: int, shift_end: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, delta, weight, bias, _, documents, ctx.layer_norm, ctx.eps, ctx.shift_begin, ctx.shift_end, fp8 = inputs
    if fp8 or bias is not None:
        raise NotImplementedError("add_norm_shift has no gradients with a bias or in float8")
    ctx.added = delta is not None
    ctx.save_for_backward(output[2] if ctx.added else x, weight, documents)


def _backward(ctx: Any, dy: Tensor, _: Any, dresidual: Tensor, last: Any) -> tuple[Any, ...]:
    x, weight, documents = ctx.saved_tensors
    dx, dweight = _gradients(
        x, weight, documents, dy, dresidual if ctx.added else None, ctx.layer_norm, ctx.eps, ctx.shift_begin, ctx.shift_end
    )
    return (dx, dx if ctx.added else None, None if weight is None else dweight, *[None] * 8)


_add_norm_shift_op.register_autograd(_backward, setup_context=_save)
