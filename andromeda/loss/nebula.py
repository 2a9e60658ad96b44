"""Nebula: the loss of a run, as the balanced sum of its declared tasks.

Every task gives sums over its targets that count. They are divided by the number of such targets in the whole step (all
micro-batches and processes), which is known beforehand; so any split of a step has the same gradient, and a part that is
masked never counts, not in the sum and not in the divisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from andromeda.config.loss import LossConfig
from andromeda.loss.balance import BALANCES, FixedWeights
from andromeda.loss.loss_task import LossHead, LossSums, LossTask
from andromeda.utils.errors import ConfigError, nearest


class LossResult(NamedTuple):
    """One micro-batch. With a step's normalizer, the results of its micro-batches add up to those of the step."""

    total: Tensor
    """What is minimized, shape (); the one with gradients."""
    tokens: Tensor
    """Targets of the first task that count, shape ()."""
    parts: dict[str, Tensor]
    """Negative log-likelihood per target of each task in nats, unweighted, shape (), without gradients."""


def shared_gradients(gradients: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Gradients by the last shared layer, (tasks, C, C), from those by the hidden states (B, T, C): what gradient normalization measures.

    The layer is a linear one at the end of the shared part, held at the identity, so that its gradient is sum_t dL/dh_t h_t^T. Those of
    micro-batches add up to that of the step.
    """
    flat = hidden.detach().flatten(0, -2)
    return torch.stack([gradient.flatten(0, -2).to(flat.dtype).T @ flat for gradient in gradients])


class Nebula:
    """The loss of a run. Called with the head (or all heads by name), the hidden states and the batch."""

    def __init__(self, tasks: Sequence[LossTask], balance: str | FixedWeights = "fixed", config: LossConfig | None = None) -> None:
        """balance: by name, with its keys in `config`, or one that was built for these tasks.

        Raises ConfigError without tasks, for two of one name, or for a balance that does not exist.
        """
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"A loss needs one or more tasks with a name each, and has {', '.join(names) or 'none'}: name every task once."
            )
        self.tasks = tuple(tasks)
        self.balance = build_balance(tasks, balance, config or LossConfig()) if isinstance(balance, str) else balance

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Targets of each task that count; summed over a step's micro-batches and processes they are its normalizer."""
        return {task.name: task.count(batch) for task in self.tasks}

    def sums(self, heads: LossHead | Mapping[str, LossHead], hidden: Tensor, batch: Any) -> dict[str, LossSums]:
        """hidden (B, T, C) -> the sums of each task over its targets that count."""
        by_name = heads if isinstance(heads, Mapping) else {"head": heads}
        return {task.name: task(by_name, hidden, batch) for task in self.tasks}

    def hidden_gradients(self, sums: Mapping[str, LossSums], hidden: Tensor) -> list[Tensor]:
        """Gradient of each task's sum by the hidden states (B, T, C) that it was computed from; the graph is kept."""
        found = (torch.autograd.grad(own.total, hidden, retain_graph=True, allow_unused=True)[0] for own in sums.values())
        return [torch.zeros_like(hidden) if gradient is None else gradient for gradient in found]

    def weigh(self, means: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the tasks' losses, shape (), or of other tensors of one shape."""
        fixed = [task.weight for task in self.tasks]
        weights: Sequence[float] | Tensor = self.balance.weights if self.balance.adapts else fixed
        terms = [_as(weight, means[task.name]) * means[task.name] for task, weight in zip(self.tasks, weights, strict=True)]
        return torch.stack(terms).sum(0)

    def __call__(
        self, heads: LossHead | Mapping[str, LossHead], hidden: Tensor, batch: Any, normalizer: Mapping[str, Tensor | int] | None = None
    ) -> LossResult:
        """hidden (B, T, C) -> the loss of this micro-batch.

        `normalizer`: targets of each task in the whole step; without it those of this batch, which makes `total` the mean
        over it. A task without a target that counts gives zero.
        """
        sums = self.sums(heads, hidden, batch)
        divisors = {name: at_least_one(own.tokens if normalizer is None else normalizer[name]) for name, own in sums.items()}
        total = self.weigh({name: own.total / divisors[name] for name, own in sums.items()})
        parts = {name: own.nll / divisors[name] for name, own in sums.items()}
        return LossResult(total, sums[self.tasks[0].name].tokens, parts)


def build_balance(tasks: Sequence[LossTask], balance: str, config: LossConfig) -> FixedWeights:
    """The balance of that name. Raises ConfigError where there is none."""
    if balance not in BALANCES:
        raise ConfigError(f"There is no balance {balance!r}{nearest(balance, BALANCES)}: use one of {', '.join(BALANCES)}.")
    return BALANCES[balance]([task.weight for task in tasks], [getattr(task, "squared", False) for task in tasks], config)


def _as(weight: float | Tensor, like: Tensor) -> float | Tensor:
    return weight.to(like) if isinstance(weight, Tensor) else weight


def at_least_one(count: Tensor | int) -> Tensor | int:
    """A divisor: a task without targets has a sum of zero."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
