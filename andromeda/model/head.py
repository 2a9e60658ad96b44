"""From hidden states to logits. The loss reads `weight`, `bias` and `softcap`, so that it never needs all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.init import InitScheme
from andromeda.model.tensor_plan import TensorPlan, check_divides
from andromeda.ops.cross_entropy import VocabularyShard
from andromeda.utils.errors import ConfigError


class LMHead(nn.Module):
    """logits = cap * tanh((x W^T + b) / cap), or the matmul alone when the cap is 0 (arXiv 2408.00118 for the cap)."""

    role = "head"
    shard: VocabularyShard | None = None
    """Which logits this head gives, where several processes give a share each; None is all of them."""

    def __init__(self, config: ModelConfig, embedding: nn.Module) -> None:
        super().__init__()
        self.tied = config.head.tied
        self.softcap = config.head.softcap
        self.weight = _tied(embedding, config) if config.head.tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head.bias else None

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the matrix, unless it is the embedding's table."""
        if not self.tied:
            scheme.fill(self.weight, "head")

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each process gives the logits of its share of the vocabulary."""
        check_divides(count, self.weight.shape[0], "model.vocab_size")
        return TensorPlan({"weight": 0, "bias": 0})

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token whose logits are computed."""
        return {"head": 2.0 * self.weight.numel()}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V)."""
        logits = self.matmul(x)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight, self.bias)


def _tied(embedding: nn.Module, config: ModelConfig) -> nn.Parameter:
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (config.vocab_size, config.hidden_size):
        raise ConfigError(
            "model.head.tied needs an embedding with a weight of vocab_size x width: use embedding.kind plain or an untied head."
        )
    return weight
