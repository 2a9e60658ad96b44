"""A layer's pass over one token of each sequence: seven kernels, of which four read a weight each, once, at the device's bandwidth.

    norm + shift + queries, values, keys  ->  norm and rotation of queries and keys  ->  attention, in parts and put together
    ->  matmul + residual  ->  norm + shift + matmul + activation  ->  matmul + residual

Values and keys are written where they belong in a cache of one size (`model.kv_cache.static`); other caches, and parts that the kernels do
not know, take the layer's own way between the matmuls.

Shapes: M sequences, C width, N outputs of the joined projection, J tokens of the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from andromeda.generate.fused_block import FusedBlock, FusedQKVAttention
from andromeda.model.forward_context import ForwardContext
from andromeda.model.head import LMHead
from andromeda.model.position.alibi import NoPositionBias, PositionBias
from andromeda.model.qk_preprocess import fused_spec
from andromeda.model.specs import NormSpec, ShiftSpec
from andromeda.model.tensor_plan import SumOfShares
from andromeda.model.transformer import Transformer
from andromeda.ops import gemv, qk_preprocess


def use_decode_kernels(model: Transformer) -> None:
    """Exchange the head, and those layers that are on a GPU and in 16 or 32 bits, for ones that take steps this way."""
    blocks = model.decoder.blocks
    for index, block in enumerate(blocks):
        if isinstance(block, FusedBlock) and not block.fp8 and gemv.unsupported_reason(_probe(block), *_weights(block)) is None:
            blocks[index] = DecodeKernelBlock(block)
    if type(model.head) is LMHead:
        model.head = DecodeKernelHead(model.head)


class DecodeKernelHead(LMHead):
    """A head that reads its weight as the layers do where it is asked for few rows."""

    def __init__(self, head: LMHead) -> None:
        nn.Module.__init__(self)
        self.softcap, self.weight, self.bias, self.shard = head.softcap, head.weight, head.bias, head.shard
        # Those that gather the logits of a vocabulary in pieces.
        self._forward_pre_hooks, self._forward_hooks = head._forward_pre_hooks, head._forward_hooks

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V)."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if torch.is_autocast_enabled(x.device.type) or gemv.unsupported_reason(rows, self.weight):
            return super().matmul(x)
        return gemv.gemv(rows, self.weight, self.bias)[0].view(*x.shape[:-1], -1)


class DecodeKernelBlock(nn.Module):
    """A `Fused` layer; passes over longer texts or more sequences are its own."""

    def __init__(self, layer: FusedBlock) -> None:
        super().__init__()
        self.layer = layer
        self._slopes: Tensor | None = None

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        if x.shape[1] != 1 or torch.is_autocast_enabled(x.device.type) or gemv.unsupported_reason(x[:, 0], *_weights(self.layer)):
            out: Tensor = self.layer(x, ctx)
            return out
        return self.step(x[:, 0].contiguous(), ctx)[:, None]

    def step(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (M, C) of one token each -> the same after the layer."""
        layer, attention, feedforward = self.layer, self.layer.attention, self.layer.feedforward
        joined, inner = attention.joined, feedforward.inner
        # Its last rows are filling.
        outputs = sum(attention.sizes)
        weight, bias = joined.weight[:outputs], None if joined.bias is None else joined.bias[:outputs]
        norm, shift, place = (
            _norm(layer.first.norm, layer.first.norm_spec),
            _shift(layer.first.shift_spec, x, ctx),
            _place(attention, ctx, x),
        )
        rows, keep = gemv.gemv(x, weight, bias, norm=norm, shift=shift, slot=place)
        mixed = self._mix(rows, ctx, placed=place is not None)
        x = _add_branch(x, mixed, attention.out, attention.sum_of_shares, keep)
        norm, shift = _norm(layer.second.norm, layer.second.norm_spec), _shift(layer.second.shift_spec, x, ctx)
        hidden, keep = gemv.gemv(x, inner.weight, inner.bias, norm=norm, shift=shift, activation=feedforward.name)
        return _add_branch(x, hidden, feedforward.out, feedforward.sum_of_shares, keep)

    def _mix(self, rows: Tensor, ctx: ForwardContext, placed: bool) -> Tensor:
        """Joined projections (M, N) -> (M, H Dv). placed: the values are in the cache already."""
        sizes, attention = self.layer.attention.sizes, self.layer.attention.inner
        q, v, k = (part[:, None] for part in rows.split(sizes, 1))
        if placed and attention.qk_kernel is not None and ctx.index is not None:
            keys, values = ctx.state.buffers
            q_heads, k_heads = q.unflatten(-1, (attention.heads, -1)), k.unflatten(-1, (attention.kv_heads, -1))
            parts = attention.qk_kernel, attention.qk_norm, ctx.rotation, NoPositionBias(), attention.scale
            form = fused_spec(q_heads, k_heads, *parts)
            if form is not None:
                form = form._replace(alibi=self._tails(ctx.bias, rows.dtype))
                queries = qk_preprocess.preprocess_qk_into_cache(q_heads, k_heads, form, keys, ctx.index)
                return attention.core_attention(queries, keys, values, attention.attention_spec(ctx)).flatten(1)
        return attention.attend_projected(q, k, v.contiguous(), ctx).flatten(1)

    def _tails(self, bias: PositionBias, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `bias` appends. Its slopes are the same in every pass, and worth no kernels of a step."""
        if bias.digits is None:
            return ()
        held = self._slopes
        if held is None or held.dtype != dtype or held.device != bias.digits.device:
            held = bias.tails(self.layer.attention.inner.scale, dtype)[0]
            # What is made while a graph is recorded is gone with it.
            if not (held.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._slopes = held
        return held, bias.digits


def _add_branch(x: Tensor, inner: Tensor, out: Any, total: SumOfShares | None, pending: gemv.PendingShiftUpdate | None) -> Tensor:
    """x (M, C) plus what the last layer `out` of a branch, or of its shares, gives for `inner` (M, K)."""
    if total is None:
        return gemv.gemv(inner, out.weight, out.bias, residual=x, pending=pending)[0]
    share, _ = gemv.gemv(inner, out.weight, out.bias, residual=x if total.is_first else None, pending=pending)
    return total(share)


def _place(attention: FusedQKVAttention, ctx: ForwardContext, x: Tensor) -> gemv.CacheSlot | None:
    """Where the values go, if there is a place for them yet and nothing is mixed into them."""
    state = ctx.state
    if not (state.static and state.buffers and ctx.index is not None and attention.inner.value_mix is None):
        return None
    values = state.buffers[1]
    return gemv.CacheSlot(values, ctx.index, attention.sizes[0]) if values.dtype == x.dtype and values.is_contiguous() else None


def _norm(norm: nn.Module, spec: NormSpec) -> gemv.GemvNorm:
    return gemv.GemvNorm(spec.kind, spec.eps, norm.weight if spec.gain else None)  # type: ignore[arg-type]


def _shift(shift: ShiftSpec, x: Tensor, ctx: ForwardContext) -> gemv.GemvTokenShift | None:
    """What the shift reads, with a past that the kernels may write to."""
    if not shift.tokens:
        return None
    state = ctx.state
    if state.static and shift.slot in state.recent:
        past = state.recent[shift.slot]
    else:
        # Others may hold what a state gives away.
        past = state.get(shift.slot, x, (len(x), shift.tokens, x.shape[1])).clone()
        state.put(shift.slot, past)
        if state.static:
            past = state.recent[shift.slot]
    return gemv.GemvTokenShift(past, ctx.documents, ctx.index)


def _weights(layer: FusedBlock) -> tuple[Tensor, ...]:
    feedforward = layer.feedforward
    return layer.attention.joined.weight, layer.attention.out.weight, feedforward.inner.weight, feedforward.out.weight


def _probe(layer: FusedBlock) -> Tensor:
    """A row as the layer is given them."""
    weight = layer.attention.joined.weight
    return weight.new_empty(1, weight.shape[1])
