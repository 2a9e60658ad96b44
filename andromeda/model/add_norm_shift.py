"""Residual sum, norm and token shift between two matmuls of a layer, as one kernel where one matches.

The kernel is matched to the specs of norm and shift once (`match`); whether it takes a given tensor (device, dtype, autocast,
a cache of fixed size) is decided at each call, which otherwise computes the parts one after the other (`reference`).

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.model.forward_context import ForwardContext
from andromeda.model.specs import NormSpec, ShiftSpec
from andromeda.ops import add_norm_shift as kernel

AddNormShift = Callable[[Tensor, Tensor | None, nn.Module, nn.Module, ForwardContext], tuple[Tensor, Tensor]]
"""(x, delta, norm, shift, ctx) with x and delta (B, T, C), None being zero -> their sum normalized and shifted, and the sum."""

COMPILED_WIDTH = 1024
"""Up to this width a compiler keeps a vector in registers too: a norm without a shift is then left to it."""


def reference(x: Tensor, delta: Tensor | None, norm: nn.Module, shift: nn.Module, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """The parts, one after the other."""
    x = x if delta is None else x + delta
    return shift(norm(x), ctx), x


def fused(
    x: Tensor, delta: Tensor | None, norm: nn.Module, shift: nn.Module, ctx: ForwardContext, *, norm_spec: NormSpec, shift_spec: ShiftSpec
) -> tuple[Tensor, Tensor]:
    """The kernel where it takes x, else the reference."""
    if not accepts(x, ctx):
        return reference(x, delta, norm, shift, ctx)
    out = launch(x, delta, norm, ctx, norm_spec, shift_spec)
    return out.y, out.residual


@cache
def match(norm: NormSpec | None, shift: ShiftSpec | None, width: int) -> AddNormShift:
    """What a layer of `width` channels calls in training."""
    if norm is None or shift is None or not matches(norm, shift) or not (shift.tokens or width > COMPILED_WIDTH):
        return reference
    return partial(fused, norm_spec=norm, shift_spec=shift)


def matches(norm: NormSpec | None, shift: ShiftSpec | None) -> bool:
    """Whether the kernel computes these parts: any norm that has a spec, and a shift by at most one token."""
    return norm is not None and shift is not None and shift.tokens <= 1


def accepts(x: Tensor, ctx: ForwardContext) -> bool:
    """Whether the kernel takes x in this pass."""
    # A step of a CUDA graph keeps its own state. Packed tokens after a cache are rare.
    plain = ctx.index is None and (ctx.documents is None or ctx.documents[0].shape == ctx.documents[1].shape)
    # The kernel has no gradient of what comes before the first token, which other processes would need.
    plain = plain and not (ctx.state.exchanges and torch.is_grad_enabled())
    return plain and kernel.is_supported(x) and not (torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32)


def launch(
    x: Tensor,
    delta: Tensor | None,
    norm: Any,
    ctx: ForwardContext,
    norm_spec: NormSpec,
    shift_spec: ShiftSpec,
    bias: Tensor | None = None,
    *,
    fp8: bool = False,
) -> kernel.AddNormShiftOutput:
    """The kernel on x, which must be accepted; bias (C,) and fp8 as in `ops.add_norm_shift`."""
    shifts, width = shift_spec.tokens == 1, x.shape[-1]
    past = _past(x, delta, norm, ctx, shift_spec) if shifts else None
    out = kernel.add_norm_shift(
        x,
        delta,
        norm.weight.to(x.dtype) if norm_spec.gain else None,
        bias,
        past,
        ctx.documents[0] if ctx.documents and shifts else None,
        layer_norm=norm_spec.kind == "layer",
        eps=norm_spec.eps,
        shift_channels=(width // 2, width // 2 * 2) if shifts else (0, 0),
        fp8=fp8,
    )
    if shifts and not ctx.state.exchanges:
        ctx.state.put(shift_spec.slot, out.last)
    return out


def _past(x: Tensor, delta: Tensor | None, norm: nn.Module, ctx: ForwardContext, shift: ShiftSpec) -> Tensor:
    """The normalized vector before the first token (B, 1, C)."""
    if not ctx.state.exchanges:
        return ctx.state.get(shift.slot, x, (x.shape[0], 1, x.shape[-1]))
    last = x[:, -1:] if delta is None else x[:, -1:] + delta[:, -1:]
    return ctx.state.shift_state(shift.slot, norm(last), 1)
