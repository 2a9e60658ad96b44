"""A value embedding of your own, with keys of its own, in one file: one table that all layers share, with a gate for each layer.

    [model.value_embedding]
    kind = "add_a_value_embedding:SharedValues"
    gate = 0.1

and train with `andromeda train my.toml --allow-code` in the folder that holds this file.

Each layer's values become v + w_l E[id], with w_l learned
for each layer; E has one row of G D numbers for each token of the vocabulary.

Shapes: B batch, T time, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from andromeda.config.base import BaseConfig
from andromeda.config.model import ModelConfig
from andromeda.model.layers import Embedding


class Gate(nn.Module):
    """v + w E[id] in one layer."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))

    def forward(self, v: Tensor, embedded: Tensor) -> Tensor:
        """v and embedded (B, T, G, D) -> (B, T, G, D)."""
        return v + self.weight.to(v.dtype) * embedded.to(v.dtype)


class SharedValues(nn.Module):
    """One table for all layers, looked up once a pass."""

    supports_cuda_graph = True

    class Config(BaseConfig):
        """Keys of `[model.value_embedding]` besides `kind`."""

        gate: float = 0.1
        """Share of the table in the values at the start."""

    def __init__(self, config: ModelConfig, own: Config) -> None:
        super().__init__()
        a = config.attention
        self.layers, self.shape = config.num_layers, (a.num_kv_heads, a.head_dim)
        self.table = Embedding(config.vocab_size, a.num_kv_heads * a.head_dim)

    @staticmethod
    def layer_mix(config: ModelConfig, layer: int, own: Config) -> nn.Module:
        """What layer number `layer` calls as mix(v, embedded)."""
        return Gate(own.gate)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids (B, T) -> the same (B, T, G, D) for each layer."""
        return (self.table(ids).unflatten(-1, self.shape),) * self.layers
