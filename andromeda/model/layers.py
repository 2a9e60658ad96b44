"""Linear maps and tables that leave their weights to `init.initialize`: one generator fills the whole model, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.ops.embedding import embed

ALIGNED = 64
"""The rows of joined matrices are filled up to a multiple of this: 128 bytes in 16 bits, as fast products write best."""


class Linear(nn.Linear):
    """x W^T + b; the bias starts at zero, the weight is not filled here."""

    def reset_parameters(self) -> None:
        """Called by the constructor."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of vectors that is not filled here."""

    def reset_parameters(self) -> None:
        """Called by the constructor."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., C)."""
        return embed(ids, self.weight)


def concat_weights(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights as one (N, K) and their biases as one (N,), zeros at the end."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    return F.pad(torch.cat(weights), (0, 0, 0, _padding(linears))), concat_biases(linears)


def concat_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    """Their biases as one (N,), zeros at the end."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return F.pad(torch.cat(biases), (0, _padding(linears))) if biases else None


def aligned(rows: int) -> int:
    """So many rows of joined matrices, filled up."""
    return rows + -rows % ALIGNED


def _padding(linears: Sequence[nn.Linear]) -> int:
    rows = sum(linear.out_features for linear in linears)
    return aligned(rows) - rows
