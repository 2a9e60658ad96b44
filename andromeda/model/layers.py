"""Linear maps and tables that leave their weights to `init.initialise`: one generator fills the whole model, once."""

from __future__ import annotations

from torch import Tensor, nn

from andromeda.kernels.embedding import embed


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
