"""What a step minimises, as sums over tokens, so that any split of a batch adds up to the same number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.config.train import TrainConfig
from andromeda.data.loader import Batch
from andromeda.loss import Nebula, next_token
from andromeda.model.feedforward.moe import Router
from andromeda.model.transformer import Transformer
from andromeda.optim import clip
from andromeda.train.callbacks.spike_guard import Span
from andromeda.train.state import Session


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


@dataclass(frozen=True)
class Work:
    """What one step learns from."""

    rows: Rows
    targets: int
    """Targets that count, in all rows."""
    span: Span
    """Where the rows are in the stream."""
    window: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one step did."""

    nll: Tensor
    """Cross entropy per target in nats, shape (), on the device."""
    norm: Tensor
    """Gradient norm before clipping, shape (), on the device."""
    bad: str | None
    """Why the weights were left as they were."""


class Stepper:
    """Takes one step after the other with the same parts."""

    def __init__(self, session: Session, objective: Callable[[Rows, int], Sums], config: TrainConfig) -> None:
        self._session, self._objective, self._limits = session, objective, config.clip
        self._micro_batch = config.micro_batch or config.batch
        self._parameters = session.optimizer.parameters()
        self._routers = [module for module in session.model.modules() if isinstance(module, Router)]

    def __call__(self, work: Work) -> Outcome:
        """Learn from `work`. The caller has set the learning rates."""
        session = self._session
        loss, nll = self._gradients(work)
        session.precision.unscale(self._parameters)
        norm = clip(self._parameters, self._limits)
        bad = self._verdict(loss, norm, work.span)
        if bad is None:
            session.optimizer.step()
            session.average.update()
        for router in self._routers:
            router.step() if bad is None else router.load.zero_()
        session.optimizer.zero_grad()
        return Outcome(nll, norm, bad)

    def _gradients(self, work: Work) -> tuple[Tensor, Tensor]:
        """Leaves the scaled gradient in the weights; returns the mean of what is minimised, and of the cross entropy."""
        precision, targets = self._session.precision, max(1, work.targets)
        loss, nll = torch.zeros((), device=precision.device), torch.zeros((), device=precision.device)
        several = len(work.rows.ids) > self._micro_batch
        # Of one micro-batch each gradient is made when its layer's turn comes, as activations go: less memory.
        with precision.summing() if several else contextlib.nullcontext():
            for micro in work.rows.split(self._micro_batch):
                part = self._add_gradients(micro, work, targets)
                loss += part.total
                nll += part.nll
        return loss, nll

    def _add_gradients(self, micro: Rows, work: Work, targets: int) -> Sums:
        """Of one micro-batch of `work`; returns its part in the means over all targets."""
        precision = self._session.precision
        for router in self._routers:
            # The balance loss is a mean over a micro-batch, which has this share in the step.
            router.loss_scale.copy_(precision.scale * (len(micro.ids) / len(work.rows.ids)))
        with precision.autocast():
            sums = self._objective(micro.to(precision.device), work.window)
        part = sums.total / targets
        (part * precision.scale).backward()
        return Sums(part.detach(), sums.nll / targets)

    def _verdict(self, loss: Tensor, norm: Tensor, span: Span) -> str | None:
        precision, guard = self._session.precision, self._session.guard
        if not (guard.enabled or precision.watches):
            return None
        loss_value, norm_value = torch.stack([loss.float(), norm.float()]).tolist()
        overflow = precision.overflowed(loss_value, norm_value)
        bad = "the scaled gradient overflowed" if overflow else guard.judge(loss_value, norm_value, span)
        precision.update(norm_value)
        return bad
