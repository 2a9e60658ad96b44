"""Position-wise networks: dense, gated, or a mixture of experts."""

from __future__ import annotations

from torch import nn

from andromeda.config.model import ModelConfig
from andromeda.model.feedforward.dense import build_mlp
from andromeda.model.feedforward.moe import MoE

__all__ = ["build_feedforward"]


def build_feedforward(config: ModelConfig) -> nn.Module:
    """The network that the configuration asks for: a module (B, T, C) -> (B, T, C)."""
    ff = config.feedforward
    return MoE(config) if ff.kind == "moe" else build_mlp(config, ff.kind, ff.bias)
