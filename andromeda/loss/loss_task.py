"""What a model can be asked to learn: a task is declared, never guessed from the look of its targets.

A task names the head that answers, the part of the batch that holds the truth, the likelihood that compares the two, and its
weight. A new kind of task is a new likelihood, or, where the targets must be made first, a new class with the face of `Task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from andromeda.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from andromeda.utils.errors import ConfigError, nearest


class LossHead(Protocol):
    """A linear map from hidden states to logits, as a loss sees it: its parts, so that the logits are never all held.

    One that is split over processes also has `shard`, a `VocabularyShard`; its weight and bias are then those of its share.
    """

    @property
    def weight(self) -> Tensor:
        """(V, C)."""

    @property
    def bias(self) -> Tensor | None:
        """(V,) or nothing."""

    @property
    def softcap(self) -> float:
        """Logits become cap tanh(logits / cap); 0 is off."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., C) -> all outputs (..., V) at once, for heads of few outputs."""


class LossSums(NamedTuple):
    """Sums over the targets of one task that count, so that any split of a batch adds up to the same."""

    total: Tensor
    """What is minimized, shape (); the one with gradients."""
    nll: Tensor
    """Negative log-likelihood alone, in nats, shape (), without gradients."""
    tokens: Tensor
    """Targets that count, shape ()."""


class LossTask(Protocol):
    """One thing to learn."""

    @property
    def name(self) -> str:
        """Under which it is reported; unique."""

    @property
    def weight(self) -> float:
        """Its share in the sum of all tasks, before balancing."""

    def count(self, batch: Any) -> Tensor:
        """Targets of the batch that count, shape (): known before any forward pass."""

    def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
        """hidden (B, T, C) -> the sums over the batch."""


class TargetLikelihood(Protocol):
    """How a head's answer is compared with the truth."""

    def count(self, target: Tensor) -> Tensor:
        """Targets that count, shape ()."""

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """The sums over the targets that count; masked ones never do."""


@dataclass(frozen=True)
class Categorical:
    """One of V classes: cross entropy, chunked (`linear_cross_entropy`); target (B, T) of class numbers, -100 does not count."""

    z_loss: float = 0.0
    """Weight of log(Z)^2 (arXiv 2204.02311, section 5)."""

    def count(self, target: Tensor) -> Tensor:
        """Targets other than -100."""
        return (target != IGNORE_INDEX).sum()

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """Cross entropy plus z-loss of every target that counts."""
        shard = getattr(head, "shard", None)
        out = linear_cross_entropy(hidden, head.weight, target, bias=head.bias, softcap=head.softcap, z_loss=self.z_loss, shard=shard)
        return LossSums(out.total, out.nll, out.tokens)


@dataclass(frozen=True)
class PredictionTask:
    """The plain task: a head answers, an attribute of the batch is the truth, a likelihood compares."""

    name: str
    likelihood: TargetLikelihood
    head: str = "head"
    target: str = "targets"
    weight: float = 1.0
    squared: bool = False
    """Whether it is a squared or absolute error and no loss of classes: what homoscedastic uncertainty must know."""

    def count(self, batch: Any) -> Tensor:
        """Targets of the batch that count, shape ()."""
        return self.likelihood.count(target_of(batch, self.target))

    def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
        """hidden (B, T, C) -> the sums over the batch. Raises ConfigError when the model has no such head."""
        if self.head not in heads:
            raise ConfigError(
                f"The task {self.name!r} is answered by the head {self.head!r}, which the model does not have{nearest(self.head, heads)}."
            )
        return self.likelihood(heads[self.head], hidden, target_of(batch, self.target))


def target_of(batch: Any, name: str) -> Tensor:
    """A target of a batch: one of those of its heads (`batch.head_targets`), or an attribute such as `targets`, the next tokens.

    Raises ConfigError where the data has no such target.
    """
    known: Mapping[str, Tensor] = getattr(batch, "head_targets", {})
    found = known.get(name, getattr(batch, name, None))
    if not isinstance(found, Tensor):
        raise ConfigError(f"The data has no target {name!r}{nearest(name, known)}: build the corpus with --target {name}=KIND.")
    return found


def next_token(z_loss: float = 0.0, weight: float = 1.0) -> PredictionTask:
    """The language model's own task: the next token of every position."""
    return PredictionTask("next_token", Categorical(z_loss), weight=weight)
