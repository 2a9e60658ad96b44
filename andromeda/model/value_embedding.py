"""Value embeddings: a table looked up by token ids, whose rows are mixed into each layer's values.

`layered`: one table of width num_layers G D whose chunk l is mixed into the values of layer l, v = (1 - w) W_v x + w E_l[id], with w
learned for each layer (modded-nanogpt, record of 2024-12-04). The ids are the unshifted ones, whatever the token shift does.

A value embedding of a user's own is one class: a module built as `Class(config)` or `Class(config, own)`, whose forward pass
gives for ids (B, T) the values (B, T, G, D) of each layer, or None for layers without, and whose `layer_mix(config, layer)` (or
`(config, layer, own)`), a static method, builds the module that a layer calls as `mix(v, embedded)`.

Shapes: B batch, T time, V vocabulary, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.config.parts import own_value_embedding
from andromeda.model.layers import Embedding
from andromeda.model.tensor_plan import TensorPlan, check_divides
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.embedding import embed_split


class ValueEmbedding(Protocol):
    """Values of each layer by token ids."""

    def __call__(self, ids: Tensor) -> Sequence[Tensor | None]:
        """ids (B, T) -> for each layer (B, T, G, D), or None."""
        ...


class NoValueEmbedding(nn.Module):
    """No table."""

    supports_cuda_graph = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depth = config.num_layers

    def forward(self, ids: Tensor) -> tuple[None, ...]:
        """None for every layer."""
        return (None,) * self.depth


class LayeredValueEmbedding(nn.Module):
    """A table (V, num_layers G D) whose rows hold the values of all layers; only one row is active per token."""

    supports_cuda_graph = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a = config.attention
        self.depth, self.shape = config.num_layers, (a.num_kv_heads, a.head_dim)
        self.table = Embedding(config.vocab_size, config.num_layers * a.num_kv_heads * a.head_dim)

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each process looks up the values of its layers, all heads."""
        check_divides(count, self.depth, "model.num_layers, whose value embeddings are split by layers")
        return TensorPlan({"table.weight": 1})

    def keep_layers(self, layers: range) -> None:
        """Look up the values of these layers only from now on; the table is theirs."""
        self.depth = len(layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids (B, T) -> for each layer (B, T, G, D)."""
        # In the compute dtype, and split: the gradients of all layers together are the largest of a step.
        parts = embed_split(ids, self.table.weight, self.depth, compute_dtype(self.table.weight))
        return tuple(v.unflatten(-1, self.shape) for v in parts)


class ValueMix(nn.Module):
    """A learned mix of projected and embedded values."""

    def __init__(self, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(init))

    def tensor_plan(self, count: int) -> TensorPlan:
        """All heads share the weight."""
        return TensorPlan()

    def forward(self, v: Tensor, embedded: Tensor) -> Tensor:
        """v and embedded (B, T, G, D) -> (B, T, G, D)."""
        return torch.lerp(v, embedded.to(v.dtype), self.weight.to(v.dtype))


def build_value_embedding(config: ModelConfig) -> Any:
    """The table that the configuration names, a `ValueEmbedding`. Raises ConfigError."""
    own = own_value_embedding(config)
    if own is not None:
        return own.build(config)
    return {"none": NoValueEmbedding, "layered": LayeredValueEmbedding}[config.value_embedding.kind](config)


def build_value_mix(config: ModelConfig, layer: int) -> nn.Module | None:
    """What mixes embedded values into those of layer number `layer`; None without a value embedding. Raises ConfigError."""
    own = own_value_embedding(config)
    if own is not None:
        mix = own.kind.layer_mix
        found: nn.Module | None = mix(config, layer) if own.config is None else mix(config, layer, own.config)
        return found
    return None if config.value_embedding.kind == "none" else ValueMix(config.value_embedding.init)
