"""What a step minimises, as sums over tokens, so that any split of a batch adds up to the same number."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from andromeda.kernels.cross_entropy import linear_cross_entropy
from andromeda.model.transformer import Transformer
from andromeda.train.rows import Rows


class Sums(NamedTuple):
    """Sums over the targets of some rows, in nats."""

    total: Tensor
    """What is minimised; the one with gradients."""
    nll: Tensor
    """Cross entropy alone."""


class NextToken:
    """Cross entropy of the next token, with the z-loss of PaLM (arXiv 2204.02311, section 5)."""

    def __init__(self, model: Transformer, z_loss: float = 0.0) -> None:
        self._model, self._z_loss = model, z_loss

    def __call__(self, batch: Rows, window: int = 0) -> Sums:
        """The sums over a batch that is on the model's device."""
        hidden = self._model.hidden(batch.ids, documents=batch.documents, window=window)
        head = self._model.head
        out = linear_cross_entropy(hidden, head.weight, batch.targets, bias=head.bias, softcap=head.softcap, z_loss=self._z_loss)
        return Sums(out.total, out.nll)
