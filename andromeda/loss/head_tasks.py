"""The tasks of a run, from the heads that its configuration declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.config import heads as kinds
from andromeda.config.loss import LossConfig
from andromeda.loss.distillation import Distillation
from andromeda.loss.likelihoods import Bernoulli, Numeric
from andromeda.loss.loss_task import Categorical, LossHead, LossSums, LossTask, PredictionTask, TargetLikelihood, next_token
from andromeda.loss.ranking import PlackettLuce
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import IGNORE_INDEX
from andromeda.utils.errors import ConfigError

NEXT_TOKEN, DISTILLATION = "next_token", "distillation"


def build_tasks(model: Transformer, config: LossConfig, z_loss: float = 0.0, teacher: Transformer | None = None) -> list[LossTask]:
    """The tasks that have a weight, the language model's own first. Raises ConfigError where none has."""
    tasks: list[LossTask] = [next_token(z_loss, config.next_token_weight)]
    known = kinds.heads_of(model.config)
    tasks += [_task(name, known[name]) if name in known else _own_task(name, head) for name, head in model.task_heads.items()]
    if config.distillation.teacher:
        student = config.distillation
        likelihood = Distillation(student.divergence, student.beta, student.temperature)
        tasks.append(DistillationTask(likelihood, teacher, student.weight))
    counting = [task for task in tasks if task.weight]
    if not counting:
        raise ConfigError("No task has a weight above 0: give one to loss.next_token_weight or to a head.")
    return counting


def _task(name: str, keys: kinds.HeadKeys) -> LossTask:
    if isinstance(keys, kinds.MultiTokenConfig):
        return MultiTokenTask(name, keys.tokens, keys.weight)
    squared = isinstance(keys, kinds.RegressionConfig) and keys.likelihood != "poisson"
    return PredictionTask(name, likelihood_of(keys), name, keys.target or name, keys.weight, squared)


def likelihood_of(keys: kinds.HeadKeys) -> TargetLikelihood:
    """The likelihood of a head of a registered kind."""
    if isinstance(keys, kinds.MultiLabelConfig):
        return Bernoulli()
    if isinstance(keys, kinds.TokenClassificationConfig):
        return Categorical()
    if isinstance(keys, kinds.RegressionConfig):
        return Numeric(keys.likelihood, keys.shift, keys.scale or 1.0, keys.learn_scale)
    assert isinstance(keys, kinds.PreferenceConfig | kinds.RankingConfig)
    return PlackettLuce(keys.max_items)


@dataclass(frozen=True)
class MultiTokenTask:
    """The tokens after the next one, each by cross entropy; a token of another document does not count."""

    name: str
    tokens: int
    weight: float = 1.0

    def count(self, batch: Any) -> Tensor:
        """Targets of all distances that count, shape ()."""
        return torch.stack([(ahead_targets(batch, ahead) != IGNORE_INDEX).sum() for ahead in range(2, self.tokens + 1)]).sum()

    def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
        """The sums over all distances."""
        shift: Any = heads[self.name]
        found = [Categorical()(heads["head"], shift(hidden, ahead), ahead_targets(batch, ahead)) for ahead in range(2, self.tokens + 1)]
        return LossSums(*(torch.stack(column).sum() for column in zip(*found, strict=True)))


def ahead_targets(batch: Any, ahead: int) -> Tensor:
    """The token `ahead` after each one, (B, T), -100 where there is none in the sequence or it is of another document."""
    targets: Tensor = batch.targets.new_full(batch.targets.shape, IGNORE_INDEX)
    targets[:, : 1 - ahead] = batch.targets[:, ahead - 1 :]
    if batch.documents is not None:
        same = batch.documents[:, : 1 - ahead] == batch.documents[:, ahead - 1 :]
        targets[:, : 1 - ahead].masked_fill_(~same, IGNORE_INDEX)
    return targets


@dataclass(frozen=True)
class DistillationTask:
    """The token probabilities of a teacher, which reads the same tokens."""

    likelihood: Distillation
    teacher: Transformer | None
    weight: float = 1.0
    name: str = DISTILLATION

    def count(self, batch: Any) -> Tensor:
        """Tokens that have a next one."""
        counted: Tensor = (batch.targets != IGNORE_INDEX).sum()
        return counted

    def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
        """The sums over these tokens."""
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher.hidden(batch.ids, documents=batch.documents)
        return self.likelihood(heads["head"], hidden, self.teacher.head, wanted, batch.targets)


@dataclass(frozen=True)
class OwnTask:
    """A head of a user's own: a module with `count(batch)` and `loss_sums(hidden, batch)`, and with `weight` in its `Config`, if any."""

    name: str
    head: Any
    weight: float
    squared: bool

    def count(self, batch: Any) -> Tensor:
        """As the module says."""
        found: Tensor = self.head.count(batch)
        return found

    def __call__(self, heads: Mapping[str, LossHead], hidden: Tensor, batch: Any) -> LossSums:
        """As the module says."""
        return LossSums(*self.head.loss_sums(hidden, batch))


def _own_task(name: str, head: nn.Module) -> OwnTask:
    missing = [method for method in ("count", "loss_sums") if not callable(getattr(head, method, None))]
    if missing:
        raise ConfigError(
            f"{type(head).__name__} of model.task_heads.{name} has no {' and no '.join(missing)}: docs/heads.md says what a head is."
        )
    return OwnTask(name, head, float(getattr(head, "loss_weight", 1.0)), bool(getattr(head, "squared", False)))
