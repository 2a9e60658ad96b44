"""A serial pre-norm layer rearranged for inference, so that fewer passes go over its activations.

Queries, keys and values come from one matmul. On a GPU, what lies between two matmuls is one kernel (`ops.add_norm_shift`),
which also rounds to 8 bits where the layers are in 8 bits; without 8 bits the last matmul adds its output to the residual stream. What a
kernel cannot do, the layer's own parts do, as before.

Shapes: B batch, T time, C width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.model import add_norm_shift
from andromeda.model.attention import Attention
from andromeda.model.block import SerialBlock
from andromeda.model.feedforward.dense import MLP
from andromeda.model.forward_context import ForwardContext
from andromeda.model.layers import concat_weights
from andromeda.model.specs import BlockSpec, MixerSpec, MLPSpec, spec_of
from andromeda.model.tensor_plan import sum_of_shares
from andromeda.ops import activation, float8_inference


class MatmulInput(NamedTuple):
    """Vectors that a matmul reads."""

    values: Tensor
    """(B, T, K) in a floating type, or in 8 bits."""
    scale: Tensor
    """What each row was divided by (B T, 1); of use in 8 bits only."""


def can_fuse(block: nn.Module) -> TypeGuard[SerialBlock]:
    """Whether `Fused` knows this layer and all of its parts."""
    if spec_of(block) != BlockSpec("serial_prenorm"):
        return False
    branches = isinstance(spec_of(block.attention), MixerSpec) and isinstance(spec_of(block.feedforward), MLPSpec)
    parts = (block.attention_norm, block.attention_shift, block.feedforward_norm, block.feedforward_shift)
    return branches and all(spec_of(part) is not None for part in parts)


class FusedBlock(nn.Module):
    """x + A(N1 x), then + F(N2 x), as `SerialBlock`; takes over the block's parts."""

    def __init__(self, block: SerialBlock, *, fp8: bool = False) -> None:
        super().__init__()
        feedforward = block.feedforward
        assert isinstance(block.attention, Attention)
        assert isinstance(feedforward, MLP)
        self.fp8 = (
            fp8
            and float8_inference.has_aligned_shape(feedforward.inner)
            and float8_inference.has_aligned_shape(feedforward.out)
            and float8_inference.has_aligned_shape(block.attention.out)
        )
        self.first = FusedAddNormShift(block.attention_norm, block.attention_shift, self.fp8)
        self.second = FusedAddNormShift(block.feedforward_norm, block.feedforward_shift, self.fp8)
        self.attention = FusedQKVAttention(block.attention, self.fp8)
        self.feedforward = (Float8FeedForward if self.fp8 else FusedFeedForward)(feedforward)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        rows, x = self.first(x, None, None, ctx)
        rows, x = self.second(x, self.attention(rows, ctx), self.feedforward.late, ctx)
        return self.feedforward(rows, x)


class FusedAddNormShift(nn.Module):
    """Sum, norm, shift and 8 bits."""

    def __init__(self, norm: nn.Module, shift: nn.Module, fp8: bool) -> None:
        super().__init__()
        self.norm, self.shift, self.fp8 = norm, shift, fp8
        self.norm_spec, self.shift_spec = spec_of(norm), spec_of(shift)
        self.matched = add_norm_shift.matches(self.norm_spec, self.shift_spec)

    def forward(self, x: Tensor, delta: Tensor | None, bias: Tensor | None, ctx: ForwardContext) -> tuple[MatmulInput, Tensor]:
        """x and delta (B, T, C) -> shifted norm of their sum, and the sum with the bias (C,)."""
        if self.matched and add_norm_shift.accepts(x, ctx):
            made = add_norm_shift.launch(x, delta, self.norm, ctx, self.norm_spec, self.shift_spec, bias, fp8=self.fp8)
            return MatmulInput(made.y, made.scale), made.residual
        x = x if delta is None else x + delta
        return to_matmul_input(self.shift(self.norm(x), ctx), self.fp8), x if bias is None else x + bias


def to_matmul_input(x: Tensor, fp8: bool) -> MatmulInput:
    """x (B, T, K), in 8 bits if asked for."""
    if not fp8:
        return MatmulInput(x, x.new_empty(0))
    flat = x.flatten(0, -2)
    values, scale = activation.activate_quantize(flat, "none") if activation.is_supported(flat, "none") else float8_inference.quantize(flat)
    return MatmulInput(values.unflatten(0, x.shape[:-1]), scale)


def apply_linear(linear: nn.Module, rows: MatmulInput) -> Tensor:
    """(B, T, N) from (B, T, K)."""
    if isinstance(linear, float8_inference.Float8DynamicLinear):
        return linear.matmul(rows.values.flatten(0, -2), rows.scale).unflatten(0, rows.values.shape[:-1])
    out: Tensor = linear(rows.values)
    return out


class FusedQKVAttention(nn.Module):
    """`Attention` whose queries, values and keys come from one matmul, in this order: so values begin where fast reads may."""

    def __init__(self, attention: Attention, fp8: bool) -> None:
        super().__init__()
        linears = (attention.query, attention.value, attention.key)
        self.sizes = [linear.out_features for linear in linears]
        joined = concat_linears(linears)
        self.fp8 = fp8
        self.joined = float8_inference.Float8DynamicLinear(joined) if fp8 else joined
        self.out = float8_inference.Float8DynamicLinear(attention.out) if fp8 else attention.out
        del attention.query, attention.value, attention.key, attention.out
        self.inner, self.sum_of_shares = attention, sum_of_shares(attention)

    def forward(self, rows: MatmulInput, ctx: ForwardContext) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, v, k, _ = apply_linear(self.joined, rows).split([*self.sizes, self.joined_width - sum(self.sizes)], -1)
        out = apply_linear(self.out, to_matmul_input(self.inner.attend_projected(q, k, v.contiguous(), ctx), self.fp8))
        return out if self.sum_of_shares is None else self.sum_of_shares(out)

    @property
    def joined_width(self) -> int:
        """Rows of the joined matrix."""
        return int(self.joined.weight.shape[0])


def concat_linears(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that computes what all of these do, side by side."""
    with torch.no_grad():
        weight, bias = concat_weights(linears)
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


class FusedFeedForward(nn.Module):
    """x + `MLP`."""

    def __init__(self, dense: MLP) -> None:
        super().__init__()
        self.inner, self.out, self.activation = dense.inner, dense.out, dense.activation
        self.name, self.sum_of_shares = spec_of(dense).activation, sum_of_shares(dense)

    @property
    def late(self) -> Tensor | None:
        """The last bias (C,), which must be in the sum that `forward` is given; of a share it is summed with the rest."""
        return self.out.bias if self.sum_of_shares is None else None

    def forward(self, rows: MatmulInput, x: Tensor) -> Tensor:
        """Rows (B, T, C), and the stream x (B, T, C) with the last bias, of which nobody else knows."""
        hidden = self.inner(rows.values)
        hidden = activation.activate(hidden, self.name) if activation.is_supported(hidden, self.name) else self.activation(hidden)
        if self.sum_of_shares is not None:
            return x + self.sum_of_shares(self.out(hidden))
        if not x.is_cuda:
            return x + F.linear(hidden, self.out.weight)
        total = x.flatten(0, -2)
        activation.residual_addmm(total, hidden.flatten(0, -2), self.out.weight)
        return total.view(x.shape)


class Float8FeedForward(nn.Module):
    """The same with both matmuls in 8 bits, the activation quantized as it is computed."""

    late = None

    def __init__(self, dense: MLP) -> None:
        super().__init__()
        self.inner, self.out, self.activation = (
            float8_inference.Float8DynamicLinear(dense.inner),
            float8_inference.Float8DynamicLinear(dense.out),
            dense.activation,
        )
        self.name, self.sum_of_shares = spec_of(dense).activation, sum_of_shares(dense)

    def forward(self, rows: MatmulInput, x: Tensor) -> Tensor:
        """Rows (B, T, C) in 8 bits, and the stream x (B, T, C)."""
        hidden = apply_linear(self.inner, rows)
        flat = hidden.flatten(0, -2)
        if activation.is_supported(flat, self.name):
            values, scale = activation.activate_quantize(flat, self.name)
            rows = MatmulInput(values.unflatten(0, hidden.shape[:-1]), scale)
        else:
            rows = to_matmul_input(self.activation(hidden), True)
        out = apply_linear(self.out, rows).to(x.dtype)
        return x + (out if self.sum_of_shares is None else self.sum_of_shares(out))
