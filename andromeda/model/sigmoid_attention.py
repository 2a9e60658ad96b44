"""Sigmoid attention (arXiv 2409.04431): every key is weighted on its own, nothing is normalized over the keys.

The weight of a key is sigmoid(logit + b) with b = -ln(max_seq_len), so that the weights of average logits sum to about one at the
full context. The paper's b follows the length of the sequence; here it is a constant, so that a cached, a packed and a
padded sequence are all computed alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.attention import Attention
from andromeda.model.tensor_plan import TensorPlan
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.attention.eager import attention_logits, weighted_values


class SigmoidAttention(Attention):
    """Causal sigmoid attention with the heads, norms, positions, window and documents of softmax attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.offset = -math.log(config.max_seq_len)

    def fused_spec(self) -> None:
        """No kernel of whole layers is for it."""

    def tensor_plan(self, count: int) -> TensorPlan:
        """As softmax attention: heads are computed apart."""
        return super().tensor_plan(count)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv), with T x S memory, in at least float32."""
        return weighted_values(torch.sigmoid(attention_logits(q, k, pattern) + self.offset), v)
