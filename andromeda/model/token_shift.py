"""Token shift: part of the channels come from previous tokens. Works with packed documents and a cache.

Chunks: the input is split into n + 1 equal groups of channels and group i is taken from i tokens before (x-transformers'
shift_tokens; channels that remain after the split stay). Lerp: each channel is a learned mix of this token and the one
before (RWKV, arXiv 2305.13048). Smear: the embedding gets a gated share of the embedding before (modded-nanogpt).

Shapes: B batch, T time, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.forward_context import ForwardContext
from andromeda.model.kv_cache.protocol import CacheBytes
from andromeda.model.layers import Linear
from andromeda.model.specs import ShiftSpec


def shifted(x: Tensor, past: Tensor, distance: int, ctx: ForwardContext) -> Tensor:
    """x (B, T, C) from `distance` tokens before; `past` (B, >= distance, C) comes before x; zero across documents."""
    before = torch.cat([past[:, past.shape[1] - distance :], x], 1)[:, : x.shape[1]]
    return ctx.within_document(before, distance)


class NoShift(nn.Module):
    """Every channel is of this token."""

    def fused_spec(self) -> ShiftSpec | None:
        """No shift."""
        return ShiftSpec()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) as it is."""
        return x


class ChunkShift(nn.Module):
    """Group i of the channels is of i tokens before."""

    def __init__(self, config: ModelConfig, slot: str) -> None:
        super().__init__()
        self.tokens, self.slot, self.width = config.shift.tokens, slot, config.hidden_size

    def fused_spec(self) -> ShiftSpec | None:
        """A shift by chunks."""
        return ShiftSpec(self.tokens, self.slot)

    def cache_bytes(self, dtype: torch.dtype) -> CacheBytes:
        """The last `tokens` vectors."""
        return CacheBytes(per_sequence=self.tokens * self.width * dtype.itemsize)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        size = x.shape[-1] // (self.tokens + 1)
        past = ctx.state.shift_state(self.slot, x, self.tokens)
        moved = [
            shifted(x[..., i * size : (i + 1) * size], past[..., i * size : (i + 1) * size], i, ctx) for i in range(1, self.tokens + 1)
        ]
        return torch.cat([x[..., :size], *moved, x[..., (self.tokens + 1) * size :]], -1)


class LerpShift(nn.Module):
    """Channel c is (1 - m_c) of this token and m_c of the one before, m learned, from 0 to 1 over the channels at the start."""

    def __init__(self, config: ModelConfig, slot: str) -> None:
        super().__init__()
        self.slot = slot
        # Made on the CPU: on the meta device linspace would import sympy.
        self.mix = nn.Parameter(torch.empty(config.hidden_size).copy_(torch.linspace(0, 1, config.hidden_size, device="cpu")))

    def cache_bytes(self, dtype: torch.dtype) -> CacheBytes:
        """The last vector."""
        return CacheBytes(per_sequence=self.mix.numel() * dtype.itemsize)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        past = ctx.state.shift_state(self.slot, x, 1)
        return torch.lerp(x, shifted(x, past, 1, ctx), self.mix.to(x.dtype))


class Smear(nn.Module):
    """x_t + w sigmoid(g . x_t[:12]) x_(t-1), on the embeddings; w starts at zero."""

    CHANNELS = 12
    role = "scalar"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slot, self.width = "smear", config.hidden_size
        self.channels = min(self.CHANNELS, config.hidden_size)
        self.gate = Linear(self.channels, 1, bias=False, init="unit_gain")
        self.weight = nn.Parameter(torch.zeros(()))

    def flops(self) -> dict[str, float]:
        """Of one token: the gate."""
        return {"smear": self.gate.flops()}

    def cache_bytes(self, dtype: torch.dtype) -> CacheBytes:
        """The last vector."""
        return CacheBytes(per_sequence=self.width * dtype.itemsize)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        before = shifted(x, ctx.state.shift_state(self.slot, x, 1), 1, ctx)
        return x + self.weight.to(x.dtype) * torch.sigmoid(self.gate(x[..., : self.channels])) * before


SHIFTS = {"chunks": ChunkShift, "lerp": LerpShift}


def build_shift(config: ModelConfig, slot: str) -> nn.Module:
    """The shift before a sub-layer; `slot` names its state among those of its layer."""
    return SHIFTS[config.shift.kind](config, slot) if config.shift.kind in SHIFTS else NoShift()


def build_smear(config: ModelConfig) -> nn.Module:
    """The shift of the embeddings."""
    return Smear(config) if config.shift.kind == "smear" else NoShift()
