"""Value embeddings: one table of depth x width whose chunk is mixed into each layer's values.

v = (1 - w) W_v x + w E_l[id], with w learned for each layer (modded-nanogpt, record of 2024-12-04). The ids are the
unshifted ones, whatever the token shift does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.layers import Embedding
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.embedding import embed_split


class NoValueEmbedding(nn.Module):
    """No table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depth = config.num_layers

    def forward(self, ids: Tensor) -> tuple[None, ...]:
        """Nothing for any layer."""
        return (None,) * self.depth


class ValueEmbedding(nn.Module):
    """A table whose row is the values of all layers: V x (depth G D); only depth G D numbers are active per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.attention
        self.depth, self.shape = config.num_layers, (a.num_kv_heads, a.head_dim)
        self.table = Embedding(config.vocab_size, config.num_layers * a.num_kv_heads * a.head_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids (B, T) -> for each layer (B, T, G, D)."""
        # In the type that the layers compute in, and apart: the gradients of all layers together are the largest of a step.
        parts = embed_split(ids, self.table.weight, self.depth, compute_dtype(self.table.weight))
        return tuple(v.unflatten(-1, self.shape) for v in parts)


class NoValueMix(nn.Module):
    """Values as projected."""

    def forward(self, v: Tensor, embedded: None) -> Tensor:
        """v (B, T, G, D)."""
        return v


class ValueMix(nn.Module):
    """A learned mix of projected and embedded values."""

    def __init__(self, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(init))

    def forward(self, v: Tensor, embedded: Tensor) -> Tensor:
        """v and embedded (B, T, G, D)."""
        return torch.lerp(v, embedded.to(v.dtype), self.weight.to(v.dtype))


def build_value_embedding(config: ModelConfig) -> nn.Module:
    """The model's table."""
    return {"none": NoValueEmbedding, "layered": ValueEmbedding}[config.value_embedding.kind](config)


def build_value_mix(config: ModelConfig) -> nn.Module:
    """A layer's mix."""
    return NoValueMix() if config.value_embedding.kind == "none" else ValueMix(config.value_embedding.init)
