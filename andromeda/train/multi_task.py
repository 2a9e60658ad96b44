"""The objective of a model with several heads, or with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.loss import LossSums, Nebula, next_token
from andromeda.loss import build_balance as balance_of
from andromeda.loss.balance import FixedWeights
from andromeda.loss.head_tasks import NEXT_TOKEN, build_tasks
from andromeda.loss.nebula import shared_gradients
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.parallel.one_process import ALONE, Collectives
from andromeda.train.objective import HeadLoss, MicroBatch, ObjectiveSums, TrainObjective


class MultiTaskObjective(TrainObjective):
    """The balanced sum of all tasks of a model with heads.

    Each task's sum is divided by its own number of targets in the whole step, which all processes know before the first micro-batch, so
    that any split of a step has the same gradient. Outside of a step (validation) sums are only measured.
    """

    def __init__(self, model: Transformer, loss: Nebula, collectives: Collectives = ALONE) -> None:
        self._model, self._loss, self._collectives = model, loss, collectives
        self._heads: dict[str, Any] = {"head": model.head, **model.task_heads}
        self._step: _StepSums | None = None

    def begin_step(self, data: MicroBatch, num_targets: int) -> None:
        """Count the targets of every task in the step."""
        counts = torch.stack([count.double() for count in self._loss.counts(data).values()]).tolist()
        self._step = _StepSums(max(1, num_targets), [int(count) for count in self._collectives.sum_numbers(*counts)])

    def __call__(self, batch: MicroBatch, window: int = 0) -> ObjectiveSums:
        """The sums over a batch. Within a step `total` is what `num_targets` divides into the weighted sum of the means."""
        hidden = self._model.hidden(batch.ids, documents=batch.documents, window=window)
        step = self._step
        if step is not None and self._loss.balance.needs_gradients:
            return self._measured(hidden, batch, step)
        sums = self._loss.sums(self._heads, hidden, batch)
        if step is not None:
            step.add(sums)
        return self._result(sums, self._loss.weigh(self._shares(sums)), hidden, batch)

    def _measured(self, hidden: Tensor, batch: MicroBatch, step: _StepSums) -> ObjectiveSums:
        """The same, with the gradient of each task by the shared layer.

        Heads read a copy of the hidden states, so that gradients by it stop there; the sum of these gradients goes on through the model
        in one backward pass, by a term that is zero and has that gradient.
        """
        copy = hidden.detach().requires_grad_()
        sums = self._loss.sums(self._heads, copy, batch)
        gradients = self._loss.hidden_gradients(sums, copy)
        step.add(sums, shared_gradients(gradients, copy))
        shares = self._shares(dict(zip(sums, gradients, strict=True)))
        onward = (hidden * self._loss.weigh(shares)).sum()
        return self._result(sums, self._loss.weigh(self._shares(sums)) + onward - onward.detach(), copy, batch)

    def _shares(self, sums: Mapping[str, LossSums | Tensor]) -> dict[str, Tensor]:
        """Sums (or their gradients) times next tokens over targets of the task in the step; outside of a step the sums themselves."""
        totals = {name: own.total if isinstance(own, LossSums) else own for name, own in sums.items()}
        if self._step is None:
            return totals
        divisors = [max(1, count) / self._step.num_targets for count in self._step.counts]
        return {name: total / divisor for (name, total), divisor in zip(totals.items(), divisors, strict=True)}

    def _result(self, sums: Mapping[str, LossSums], total: Tensor, hidden: Tensor, batch: MicroBatch) -> ObjectiveSums:
        others = {name: own for name, own in sums.items() if name != NEXT_TOKEN}
        return ObjectiveSums(total, self._next_token(sums, hidden, batch), others)

    def _next_token(self, sums: Mapping[str, LossSums], hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Cross entropy of the next token, which is measured also where it is not learned."""
        if NEXT_TOKEN in sums:
            return sums[NEXT_TOKEN].nll
        with torch.no_grad():
            return next_token()(self._heads, hidden, batch).nll

    def end_step(self, taken: bool) -> dict[str, HeadLoss]:
        """The balance learns from a step that was taken."""
        step, self._step = self._step, None
        assert step is not None
        assert step.sums is not None
        totals, nlls = self._collectives.sum_(step.sums)
        if taken:
            counts = torch.tensor(step.counts, dtype=totals.dtype, device=totals.device)
            norms = None
            if step.gradients is not None:
                norms = self._collectives.sum_(step.gradients).flatten(1).norm(dim=1).to(totals.dtype) / counts.clamp(min=1)
            self._loss.balance.update(totals / counts.clamp(min=1), counts > 0, norms)
        found = zip(self._loss.tasks, nlls, step.counts, strict=True)
        return {task.name: HeadLoss(nll, count) for task, nll, count in found if task.name != NEXT_TOKEN}

    def metrics(self) -> dict[str, float]:
        """The weights of the tasks, where they change."""
        balance = self._loss.balance
        if not balance.adapts:
            return {}
        return {f"weight/{task.name}": weight for task, weight in zip(self._loss.tasks, balance.weights.tolist(), strict=True)}


class _StepSums:
    """What is summed over the micro-batches of a step."""

    def __init__(self, num_targets: int, counts: list[int]) -> None:
        self.num_targets, self.counts = num_targets, counts
        self.sums: Tensor | None = None
        """(2, tasks): what is minimized, and negative log-likelihoods."""
        self.gradients: Tensor | None = None
        """(tasks, C, C), as `shared_gradients` gives them."""

    def add(self, sums: Mapping[str, LossSums], gradients: Tensor | None = None) -> None:
        found = torch.stack([torch.stack([own.total.detach().double(), own.nll.double()]) for own in sums.values()], dim=1)
        self.sums = found if self.sums is None else self.sums + found
        if gradients is not None:
            self.gradients = gradients if self.gradients is None else self.gradients + gradients


def learns_several(config: RunConfig) -> bool:
    """Whether a run learns anything besides the next token, or not the next token."""
    return bool(config.model.task_heads or config.loss.distillation.teacher)


def build_balance(config: RunConfig) -> FixedWeights:
    """The balance of a run's tasks, whose state belongs to the run's."""
    if not learns_several(config):
        return FixedWeights([1.0], [False], config.loss)
    tasks = build_tasks(meta_model(config.model), config.loss, config.train.z_loss)
    return balance_of(tasks, config.loss.balance, config.loss)
