"""The training objective as sums over tokens, so that any split of a batch into micro-batches adds up to the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.data.loader import Batch
from andromeda.loss import Nebula, next_token
from andromeda.model.transformer import Transformer


class Sums(NamedTuple):
    """Sums over the targets of some rows, in nats."""

    total: Tensor
    """What is minimized; the one with gradients."""
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


class Rows(NamedTuple):
    """Some rows of the stream."""

    ids: Tensor
    """(B, T)."""
    targets: Tensor
    """(B, T), the id after each id, -100 where it does not count."""
    documents: Tensor | None
    """(B, T) document numbers, or None where attention may cross documents."""

    @classmethod
    def of(cls, batch: Batch, document_mask: bool) -> Rows:
        """What a model reads of a batch."""
        return cls(batch.ids, batch.targets, batch.documents if document_mask else None)

    def to(self, device: torch.device) -> Rows:
        """On a device, without waiting for it."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def split(self, rows: int) -> Iterator[Rows]:
        """`rows` rows at a time."""
        for start in range(0, len(self.ids), rows):
            yield self._each(itemgetter(slice(start, start + rows)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        documents = None if self.documents is None else change(self.documents)
        return Rows(change(self.ids), change(self.targets), documents)
