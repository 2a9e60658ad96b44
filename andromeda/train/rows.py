"""The part of a batch that a forward pass reads, cut into micro-batches and moved to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.data.loader import Batch


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
