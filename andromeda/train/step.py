"""One optimizer step: gradients of all micro-batches, clipping, the check for loss spikes, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from andromeda.config.train import TrainConfig
from andromeda.model.feedforward.moe import Router
from andromeda.optim import clip_gradients
from andromeda.train.callbacks.spike_guard import RowRange
from andromeda.train.objective import HeadLoss, MicroBatch, ObjectiveSums, TrainObjective
from andromeda.train.state import TrainState


@dataclass(frozen=True)
class StepBatch:
    """What one step learns from."""

    data: MicroBatch
    """Those of its sequences that this process reads."""
    num_targets: int
    """Targets that count, over the sequences of all processes."""
    rows: RowRange
    """Where the sequences are in the stream."""
    window: int = 0
    """Attention window of the window warm-up, in tokens; 0 is the configured one."""


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    nll: Tensor
    """Cross entropy per target in nats, shape (), on the device."""
    grad_norm: Tensor
    """Gradient norm before clipping, shape (), on the device."""
    skip_reason: str | None
    """Why the update was skipped, or None."""
    heads: Mapping[str, HeadLoss] = field(default_factory=dict)
    """Losses of the heads besides the language model's."""


class TrainStep:
    """Runs optimizer steps on a TrainState."""

    def __init__(self, state: TrainState, objective: Callable[[MicroBatch, int], ObjectiveSums], config: TrainConfig) -> None:
        self._state, self._objective, self._clip = state, objective, config.clip
        self._hooks = objective if isinstance(objective, TrainObjective) else None
        self._collectives = state.collectives
        self._micro_batch_size = config.micro_batch_size or config.batch_size // self._collectives.layout.data
        self._parameters = state.optimizer.parameters()
        self._routers = [module for module in state.model.modules() if isinstance(module, Router)]

    def __call__(self, batch: StepBatch) -> StepResult:
        """Learn from `batch`. The caller has set the learning rates."""
        state = self._state
        if self._hooks:
            self._hooks.begin_step(batch.data, batch.num_targets)
        loss, nll = self._accumulate_grads(batch)
        self._collectives.reduce_grads(self._parameters)
        state.precision.unscale_grads(self._parameters)
        grad_norm = clip_gradients(self._parameters, self._clip)
        skip_reason = self._check(loss, grad_norm, batch.rows)
        if skip_reason is None:
            state.optimizer.step()
            if state.ema is not None:
                state.ema.update()
        for router in self._routers:
            if skip_reason is None:
                self._collectives.sum_(router.load)
                router.step()
            else:
                router.load.zero_()
            router.step_load.zero_()
        state.optimizer.zero_grad()
        heads = self._hooks.end_step(skip_reason is None) if self._hooks else {}
        return StepResult(nll, grad_norm, skip_reason, heads)

    def _accumulate_grads(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Accumulates the scaled gradient in the weights; returns the mean of the objective and of the cross entropy, of all processes."""
        precision, num_targets = self._state.precision, max(1, batch.num_targets)
        loss, nll = torch.zeros((), device=precision.device), torch.zeros((), device=precision.device)
        several = len(batch.data.ids) > self._micro_batch_size
        for router in self._routers:
            router.loss_scale.copy_(precision.loss_scale)
        if several or self._collectives.layout.data * self._collectives.layout.context > 1:
            self._count_expert_load(batch)
        # With one micro-batch, each gradient is allocated when the backward pass reaches its layer, as activations are freed: less memory.
        with precision.accumulate_grads() if several else contextlib.nullcontext():
            for start in range(0, len(batch.data.ids), self._micro_batch_size):
                end = start + self._micro_batch_size
                with self._collectives.gradient_sync(last=end >= len(batch.data.ids)):
                    means = self._backward(batch.data.rows(start, end), batch, num_targets)
                loss += means.total
                nll += means.nll
        sums = self._collectives.sum_(torch.stack([loss, nll]))
        return sums[0], sums[1]

    @torch.no_grad()
    def _count_expert_load(self, batch: StepBatch) -> None:
        """Count how often the whole step chooses each expert, which the balance loss multiplies every token's scores with.

        The gradient of a micro-batch passes through all layers, so the counts of the others must be known before its backward pass: one
        more forward pass without gradients or head, and only with `balance = "loss"`.
        """
        routers = [router for router in self._routers if router.balance == "loss"]
        if not routers:
            return
        precision, model = self._state.precision, self._state.model
        for micro_batch in batch.data.split(self._micro_batch_size):
            data = micro_batch.to(precision.device)
            with precision.autocast():
                self._collectives.hidden(model, data.ids, data.documents, batch.window)
        for router in routers:
            router.step_load.copy_(self._collectives.sum_(router.load))
            router.load.zero_()

    def _backward(self, micro_batch: MicroBatch, batch: StepBatch, num_targets: int) -> ObjectiveSums:
        """Forward and backward pass of one micro-batch of `batch`; returns its share of the means over all targets."""
        precision = self._state.precision
        with precision.autocast():
            sums = self._objective(micro_batch.to(precision.device), batch.window)
        mean = sums.total / num_targets
        (mean * precision.loss_scale).backward()
        return ObjectiveSums(mean.detach(), sums.nll / num_targets)

    def _check(self, loss: Tensor, grad_norm: Tensor, rows: RowRange) -> str | None:
        precision, guard = self._state.precision, self._state.spike_guard
        if not (guard.enabled or precision.syncs_every_step):
            return None
        loss_value, norm_value = torch.stack([loss.float(), grad_norm.float()]).tolist()
        overflow = precision.overflowed(loss_value, norm_value)
        reason = "the scaled gradient overflowed" if overflow else guard.check(loss_value, norm_value, rows)
        precision.update(norm_value)
        return reason
