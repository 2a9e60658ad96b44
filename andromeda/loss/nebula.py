"""Nebula: the loss of a run, as the balanced sum of its declared tasks.

Every task gives sums over its targets that count. They are divided by the number of such targets in the whole step (all
micro-batches and processes), which is known beforehand; so any split of a step has the same gradient, and a part that is
masked never counts, not in the sum and not in the divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from andromeda.loss.loss_task import LossHead, LossTask
from andromeda.utils.errors import ConfigError, nearest


class LossResult(NamedTuple):
    """One micro-batch. With a step's normalizer, the results of its micro-batches add up to those of the step."""

    total: Tensor
    """What is minimized, shape (); the one with gradients."""
    tokens: Tensor
    """Targets of the first task that count, shape ()."""
    parts: dict[str, Tensor]
    """Negative log-likelihood per target of each task in nats, unweighted, shape (), without gradients."""


class FixedWeights(nn.Module):
    """The weights that the tasks declare. Tuned, they match the adaptive methods (unitary scalarization, arXiv 2201.04122)."""

    def __init__(self, tasks: Sequence[LossTask]) -> None:
        super().__init__()
        self._weights = {task.name: task.weight for task in tasks}

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the means, shape ()."""
        return torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()


BALANCES: dict[str, Callable[[Sequence[LossTask]], nn.Module]] = {"fixed": FixedWeights}
"""How tasks are weighed against each other. A module each, since some learn their weights."""


class Nebula(nn.Module):
    """The loss of a run. Called with the head (or all heads by name), the hidden states and the batch."""

    def __init__(self, tasks: Sequence[LossTask], balance: str = "fixed") -> None:
        """Raises ConfigError without tasks, for two of one name, or for a balance that does not exist."""
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"A loss needs one or more tasks with a name each, and has {', '.join(names) or 'none'}: name every task once."
            )
        if balance not in BALANCES:
            raise ConfigError(f"There is no balance {balance!r}{nearest(balance, BALANCES)}: use one of {', '.join(BALANCES)}.")
        self.tasks = tuple(tasks)
        self.balance = BALANCES[balance](tasks)

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Targets of each task that count; summed over a step's micro-batches and processes they are its normalizer."""
        return {task.name: task.count(batch) for task in self.tasks}

    def forward(
        self, heads: LossHead | Mapping[str, LossHead], hidden: Tensor, batch: Any, normalizer: Mapping[str, Tensor | int] | None = None
    ) -> LossResult:
        """hidden (B, T, C) -> the loss of this micro-batch.

        `normalizer`: targets of each task in the whole step; without it those of this batch, which makes `total` the mean
        over it. A task without a target that counts gives zero.
        """
        by_name = heads if isinstance(heads, Mapping) else {"head": heads}
        sums = {task.name: task(by_name, hidden, batch) for task in self.tasks}
        divisors = {name: _at_least_one(own.tokens if normalizer is None else normalizer[name]) for name, own in sums.items()}
        total = self.balance({name: own.total / divisors[name] for name, own in sums.items()})
        parts = {name: own.nll / divisors[name] for name, own in sums.items()}
        return LossResult(total, sums[self.tasks[0].name].tokens, parts)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
