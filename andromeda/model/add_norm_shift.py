"""What lies between two products of a layer: the sum with a branch, norm and token shift.

The parts do it one after the other; where a kernel knows all of them, it does the same at once (as `prepare` has it for
queries and keys).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from andromeda.model.forward_context import ForwardContext
from andromeda.model.norm import LayerNorm, RMSNorm, RMSNormNoGain
from andromeda.model.token_shift import ChunkShift, NoShift
from andromeda.ops import add_norm_shift as kernel

NARROW = 1024
"""Up to this width a compiler keeps a vector in registers too; then a norm without a shift is left to it."""


def add_norm_shift(x: Tensor, delta: Tensor | None, norm: nn.Module, shift: nn.Module, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """x and delta (B, T, C), None being zero -> their sum normalized and shifted, and the sum."""
    worth = isinstance(shift, ChunkShift) or x.shape[-1] > NARROW
    if worth and accepts(x, norm, shift, ctx):
        made = fused(x, delta, norm, shift, ctx)
        return made.y, made.residual
    x = x if delta is None else x + delta
    return shift(norm(x), ctx), x


def accepts(x: Tensor, norm: nn.Module, shift: nn.Module, ctx: ForwardContext) -> bool:
    """Whether the kernel knows these parts and can take x."""
    known = type(norm) in (LayerNorm, RMSNorm, RMSNormNoGain) and moved(shift, x.shape[-1]) is not None
    # A step of a recorded graph keeps its own state. Packed tokens after a cache are seldom.
    plain = ctx.index is None and (ctx.documents is None or ctx.documents[0].shape == ctx.documents[1].shape)
    return known and plain and kernel.is_supported(x) and not (torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32)


def moved(shift: nn.Module, width: int) -> tuple[int, int] | None:
    """Channels from and to, of the token before; None for shifts that the kernel does not know."""
    if type(shift) is NoShift:
        return 0, 0
    if type(shift) is not ChunkShift or shift.tokens > 1:
        return None
    return width // 2, width // 2 * 2


def fused(
    x: Tensor,
    delta: Tensor | None,
    norm: nn.Module,
    shift: nn.Module,
    ctx: ForwardContext,
    bias: Tensor | None = None,
    *,
    fp8: bool = False,
) -> kernel.AddNormShiftOutput:
    """The kernel on these parts, which must be accepted; bias and fp8 as it has them."""
    assert isinstance(norm, (LayerNorm, RMSNorm, RMSNormNoGain))
    channels = moved(shift, x.shape[-1])
    assert channels is not None
    slot = shift.slot if isinstance(shift, ChunkShift) else None
    past = None if slot is None else ctx.state.get(slot, x, (x.shape[0], 1, x.shape[2]))
    weight = None if isinstance(norm, RMSNormNoGain) else norm.weight.to(x.dtype)
    documents = ctx.documents[0] if ctx.documents and slot is not None else None
    layer = isinstance(norm, LayerNorm)
    made = kernel.add_norm_shift(x, delta, weight, bias, past, documents, layer_norm=layer, eps=norm.eps, shift_channels=channels, fp8=fp8)
    if slot is not None:
        ctx.state.put(slot, made.last)
    return made
