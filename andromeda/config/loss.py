"""What a run minimizes besides the loss of each head: how the losses become one, and a teacher to learn from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from andromeda.config.base import BaseConfig


class DistillationConfig(BaseConfig):
    """Learning from the token probabilities of a larger model, besides the text itself."""

    teacher: str = ""
    """Run folder of the teacher, which must have the same tokenizer; empty is off."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or the generalized Jensen-Shannon divergence (arXiv 2306.13649)."""
    beta: float = Field(0.5, gt=0.0, lt=1.0)
    """jsd: weight of the teacher in the mixture."""
    temperature: PositiveFloat = 1.0
    """Of both softmaxes; the divergence is multiplied by its square (arXiv 1503.02531)."""
    weight: NonNegativeFloat = 1.0
    """Share in the sum of all losses, before balancing."""


class LossConfig(BaseConfig):
    """How the losses of all heads become one."""

    balance: Literal["fixed", "uncertainty", "gradnorm", "dwa"] = "fixed"
    """The declared weights; homoscedastic uncertainty (arXiv 1705.07115); gradient normalization (1711.02257); or equal loss rate, as
    dynamic weight average (1803.10704)."""
    next_token_weight: NonNegativeFloat = 1.0
    """Share of the language model's own loss; 0 leaves the text unlearned."""
    weight_lr: PositiveFloat = 0.025
    """uncertainty, gradnorm: learning rate of the task weights (Adam)."""
    alpha: NonNegativeFloat = 1.5
    """gradnorm: how strongly a task that has come less far is pulled up."""
    temperature: PositiveFloat = 2.0
    """dwa: softness of the weights."""
    every: int = Field(100, gt=0)
    """dwa: steps over which a loss is averaged before it is compared with the ones before."""
    distillation: DistillationConfig = DistillationConfig()
