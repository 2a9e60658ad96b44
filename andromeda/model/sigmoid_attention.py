"""Sigmoid attention (arXiv 2409.04431): every key is weighed on its own, nothing is normalized along a row.

The weight of a key is sigmoid(logit + b) with b = -ln(context), so that a row of average logits sums to about one at the
full context. The paper's b follows the length of the sequence; here it is a constant, so that a cached, a packed and a
padded sequence are all computed alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.attention import Attention
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.attention.eager import attention_logits, weighted_values


class SigmoidAttention(Attention):
    """Causal sigmoid attention with the heads, norms, positions, window and documents of softmax attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.offset = -math.log(config.max_seq_len)

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv), with T x S memory, in at least float32."""
        return weighted_values(torch.sigmoid(attention_logits(q, k, pattern) + self.offset), v)
