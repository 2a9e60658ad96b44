"""What a model predicts besides the next token: one table `[model.task_heads.NAME]` for each head, checked by the `Config` of its kind.

The keys follow Hugging Face's configurations (`num_labels`; `problem_type` there is `kind` here).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from andromeda.config.base import BaseConfig
from andromeda.config.model import HeadTable, ModelConfig
from andromeda.config.validation_errors import validate

MAX_LABELS = 30_000
"""Token classes are kept in 16 bits."""
MAX_ITEMS = 64
"""Documents of one ranking."""
Labels = Annotated[int, Field(ge=0, le=MAX_LABELS)]


class HeadKeys(BaseConfig):
    """Keys of every head."""

    target_kind: ClassVar[str] = ""
    """What `andromeda data build --target NAME=KIND` stores for it; empty where the tokens themselves are the target."""

    weight: NonNegativeFloat = 1.0
    """Share in the sum of all losses, before balancing."""
    target: str = ""
    """Target of the corpus that it predicts; empty is the one of the head's own name."""

    @property
    def num_outputs(self) -> int:
        """Numbers that the head gives for a token."""
        return 1


class TokenClassificationConfig(HeadKeys):
    """A class for each token, such as an entity: softmax and cross entropy."""

    target_kind = "spans"
    num_labels: Labels = 0
    """Classes; 0 takes those of the corpus."""

    @property
    def num_outputs(self) -> int:
        """One logit for each class."""
        return self.num_labels


class ClassificationConfig(TokenClassificationConfig):
    """A class for each document, read at its last token: softmax and cross entropy."""

    target_kind = "label"


class MultiLabelConfig(TokenClassificationConfig):
    """Any number of labels for each document: a sigmoid and binary cross entropy for each."""

    target_kind = "labels"


class RegressionConfig(HeadKeys):
    """A number for each document."""

    target_kind = "number"
    likelihood: Literal["gaussian", "laplace", "poisson"] = "gaussian"
    """`gaussian` is squared error, `laplace` absolute error (for heavy tails), `poisson` a count with a log rate."""
    learn_scale: bool = False
    """gaussian, laplace: the head also gives the logarithm of the scale, and so how sure it is (arXiv 1703.04977)."""
    shift: float = 0.0
    """gaussian, laplace: the head predicts (number - shift) / scale."""
    scale: NonNegativeFloat = 0.0
    """With `shift`: 0 takes mean and standard deviation of the corpus."""

    @property
    def num_outputs(self) -> int:
        """The location or log rate, and the log scale where it is learned."""
        return 2 if self.learn_scale else 1


class PreferenceConfig(HeadKeys):
    """Which of two documents is better: Bradley-Terry, -log sigmoid(score(chosen) - score(rejected))."""

    target_kind = "pair"

    @property
    def max_items(self) -> int:
        """Documents that are compared."""
        return 2


class RankingConfig(HeadKeys):
    """The order of several documents, best first: Plackett-Luce, which for two documents is Bradley-Terry."""

    target_kind = "ranking"
    items: int = Field(8, ge=2, le=MAX_ITEMS)
    """Documents of one ranking at most; worse ones do not count."""

    @property
    def max_items(self) -> int:
        """Documents that are compared."""
        return self.items


class MultiTokenConfig(HeadKeys):
    """The tokens after the next one: a residual block for each (arXiv 2401.10774) before the output matrix that all share (2404.19737)."""

    tokens: int = Field(2, ge=2, le=64)
    """Tokens ahead that are predicted in all, the next one included."""


HEAD_KINDS: dict[str, type[HeadKeys]] = {
    "token_classification": TokenClassificationConfig,
    "classification": ClassificationConfig,
    "multi_label": MultiLabelConfig,
    "regression": RegressionConfig,
    "preference": PreferenceConfig,
    "ranking": RankingConfig,
    "multi_token": MultiTokenConfig,
}
"""Kinds that `model.task_heads.NAME.kind` may name. `auto` is the kind that follows from the corpus's target."""
KIND_OF_TARGET = {config.target_kind: kind for kind, config in HEAD_KINDS.items() if config.target_kind}
"""The head that a target of the corpus asks for."""


def head_keys(name: str, table: HeadTable) -> HeadKeys:
    """The keys of a head of a registered kind, typed. Raises ConfigError."""
    return validate(HEAD_KINDS[table.kind], table.own, f"model.task_heads.{name}")


def target_name(name: str, table: HeadTable) -> str:
    """The target of the corpus that a head predicts; empty where the tokens themselves are the target."""
    keys = HEAD_KINDS.get(table.kind)
    return "" if keys is not None and not keys.target_kind else str(table.own.get("target") or name)


def heads_of(model: ModelConfig) -> dict[str, HeadKeys]:
    """The keys of the heads of registered kinds, by name. Raises ConfigError."""
    return {name: head_keys(name, table) for name, table in model.task_heads.items() if table.kind in HEAD_KINDS}
