"""What a step minimises, as sums over tokens, so that any split of a batch adds up to the same number."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from andromeda.loss import Nebula, next_token
from andromeda.model.transformer import Transformer
from andromeda.train.rows import Rows


class Sums(NamedTuple):
    """Sums over the targets of some rows, in nats."""

    total: Tensor
    """What is minimised; the one with gradients."""
    nll: Tensor
    """Cross entropy alone."""


class NextToken:
    """Nebula with the one task of a language model: cross entropy of the next token, with its z-loss."""

    def __init__(self, model: Transformer, z_loss: float = 0.0) -> None:
        self._model = model
        self._loss = Nebula([next_token(z_loss)])
        # Sums, not means: the step divides by the targets of all its micro-batches.
        self._undivided = {task.name: 1 for task in self._loss.tasks}

    def __call__(self, batch: Rows, window: int = 0) -> Sums:
        """The sums over a batch that is on the model's device."""
        hidden = self._model.hidden(batch.ids, documents=batch.documents, window=window)
        result = self._loss(self._model.head, hidden, batch, self._undivided)
        return Sums(result.total, result.parts["next_token"])
