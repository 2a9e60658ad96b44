"""Linear layers and tables whose weights `init.initialize` fills: one generator for the whole model, once.

Shapes: K inputs, N outputs, V rows of a table, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.model.init import InitScheme, Rule
from andromeda.model.specs import LinearSpec
from andromeda.ops.compute_dtype import compute_dtype
from andromeda.ops.embedding import embed
from andromeda.ops.master_weight_linear import CastWeight

ALIGNED = 64
"""Concatenated matrices are padded to a multiple of this many rows: 128 bytes in 16 bits, as fast matmuls write best."""


class Linear(nn.Linear):
    """x W^T + b; the bias starts at zero, the weight by `init` (see `init.Rule`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, init: Rule = "input", device: Any = None) -> None:
        super().__init__(in_features, out_features, bias, device=device)
        self.init: Rule = init

    def reset_parameters(self) -> None:
        """Called by the constructor: zero the bias, leave the weight to `init_weights`."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the weight."""
        scheme.fill(self.weight, self.init)

    def fused_spec(self) -> LinearSpec | None:
        """In the compute dtype."""
        return LinearSpec("plain")

    def compute_weight(self, x: Tensor) -> CastWeight:
        """The weight in the dtype of matmuls with x."""
        return CastWeight(self.weight.detach().to(compute_dtype(x)), None)

    def flops(self) -> float:
        """Of one vector."""
        return 2.0 * self.in_features * self.out_features


class Embedding(nn.Embedding):
    """A table of vectors (V, C)."""

    role = "embedding"

    def reset_parameters(self) -> None:
        """Called by the constructor: leave the table to `init_weights`."""

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the table."""
        scheme.fill(self.weight, "table")

    def idle_parameters(self) -> int:
        """Numbers that take no part in computing one token: all rows but one."""
        return (self.weight.shape[0] - 1) * self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., C)."""
        return embed(ids, self.weight)


def concat_weights(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights as one matrix (N, K) and their biases as one vector (N,), padded with zeros at the end."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    return F.pad(torch.cat(weights), (0, 0, 0, _padding(linears))), concat_biases(linears)


def concat_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    """Their biases as one vector (N,), padded with zeros at the end."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return F.pad(torch.cat(biases), (0, _padding(linears))) if biases else None


def aligned(rows: int) -> int:
    """Rows of concatenated matrices, padded."""
    return rows + -rows % ALIGNED


def _padding(linears: Sequence[nn.Linear]) -> int:
    rows = sum(linear.out_features for linear in linears)
    return aligned(rows) - rows
