"""Heads and batches for tests of losses, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 5


class SmallHead(nn.Module):
    """K outputs of hidden states of five channels."""

    softcap = 0.0

    def __init__(self, K: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(K, WIDTH, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(K, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LabeledBatch:
    """What the tasks read of a batch."""

    targets: Tensor
    head_targets: dict[str, Tensor] = field(default_factory=dict)
    documents: Tensor | None = None
    ids: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LabeledBatch:
        documents, ids = (None if x is None else function(x) for x in (self.documents, self.ids))
        return LabeledBatch(function(self.targets), {name: function(x) for name, x in self.head_targets.items()}, documents, ids)


def draw_hidden(B: int = 6, T: int = 8, seed: int = 1) -> Tensor:
    """Hidden states (B, T, 5)."""
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
