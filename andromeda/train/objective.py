"""The training objective as sums over tokens, so that any split of a batch into micro-batches adds up to the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.data.loader import Batch
from andromeda.loss import LossSums, Nebula, next_token
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import fa4
from andromeda.parallel.one_process import ALONE, Collectives


class ObjectiveSums(NamedTuple):
    """Sums over the targets of a micro-batch, in nats, each of shape ()."""

    total: Tensor
    """What is minimized; the one with gradients."""
    nll: Tensor
    """Cross entropy of the next token alone."""
    heads: Mapping[str, LossSums] = MappingProxyType({})
    """Of each other task."""


class HeadLoss(NamedTuple):
    """The loss of one head in a step."""

    nll: Tensor
    """Summed over its targets that count, of all processes, in nats, shape ()."""
    targets: int
    """How many count."""


class MicroBatch(NamedTuple):
    """Sequences as a model reads them."""

    ids: Tensor
    """(B, T)."""
    targets: Tensor
    """(B, T), the id after each id, -100 where it does not count."""
    documents: Tensor | None
    """(B, T) document numbers, or None where attention may cross documents."""
    head_targets: Mapping[str, Tensor] = MappingProxyType({})
    """Targets of other heads by name, (B, T, ...) each."""

    @classmethod
    def from_batch(cls, batch: Batch, document_mask: bool) -> MicroBatch:
        """What a model reads of a batch of the stream."""
        return cls(batch.ids, batch.targets, batch.documents if document_mask else None, batch.head_targets)

    def to(self, device: torch.device) -> MicroBatch:
        """Copied to a device. A copy to a GPU goes through pinned memory, and does not wait for earlier kernels."""
        if device.type != "cuda" or self.ids.is_cuda:
            return self._map(lambda x: x.to(device, non_blocking=True))
        copied = self._map(lambda x: x.pin_memory().to(device, non_blocking=True))
        if self.documents is not None and copied.documents is not None:
            fa4.cache_document_bounds(copied.documents, self.documents)
        return copied

    def split(self, size: int) -> Iterator[MicroBatch]:
        """Micro-batches of `size` sequences each; the last may be smaller."""
        for start in range(0, len(self.ids), size):
            yield self.rows(start, start + size)

    def rows(self, start: int, end: int) -> MicroBatch:
        """Sequences `start` up to `end`."""
        return self._map(itemgetter(slice(start, end)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        documents = None if self.documents is None else function(self.documents)
        heads = {name: function(target) for name, target in self.head_targets.items()}
        return MicroBatch(function(self.ids), function(self.targets), documents, heads)


class TrainObjective:
    """What a run minimizes, called with micro-batches. Around those of a step, `begin_step` and `end_step` are called."""

    def begin_step(self, data: MicroBatch, num_targets: int) -> None:
        """data: all sequences of the step that this process reads; num_targets: next tokens of all processes, by which the sums of
        `total` will be divided."""

    def end_step(self, taken: bool) -> dict[str, HeadLoss]:
        """After the last micro-batch. taken: whether the weights were updated. Returns the losses of heads."""
        return {}

    def metrics(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of the objective itself."""
        return {}

    def __call__(self, batch: MicroBatch, window: int = 0) -> ObjectiveSums:
        """The sums over a batch on the model's device."""
        raise NotImplementedError


class NextTokenObjective(TrainObjective):
    """Nebula with the one task of a language model: cross entropy of the next token, with its z-loss."""

    def __init__(self, model: Transformer, z_loss: float = 0.0, collectives: Collectives = ALONE) -> None:
        self._model, self._collectives = model, collectives
        self._loss = Nebula([next_token(z_loss)])
        # Sums, not means: the step divides by the number of targets of all its micro-batches.
        self._normalizer = {task.name: 1 for task in self._loss.tasks}

    def __call__(self, batch: MicroBatch, window: int = 0) -> ObjectiveSums:
        """The sums over a batch on the model's device, or over this process's share where its sequences are split over processes."""
        hidden = self._collectives.hidden(self._model, batch.ids, batch.documents, window)
        batch = batch._replace(targets=self._collectives.split(batch.targets))
        result = self._loss(self._model.head, hidden, batch, self._normalizer)
        return ObjectiveSums(result.total, result.parts["next_token"])
