"""What a step minimizes, as sums over tokens, so that any split of a batch adds up to the same number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.config.train import TrainConfig
from andromeda.model.feedforward.moe import Router
from andromeda.optim import clip
from andromeda.train.callbacks.spike_guard import Span
from andromeda.train.objective import Rows, Sums
from andromeda.train.state import Session


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
        self._micro_batch = config.micro_batch_size or config.batch_size
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
        """Leaves the scaled gradient in the weights; returns the mean of what is minimized, and of the cross entropy."""
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
