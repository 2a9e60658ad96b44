"""The configuration of the continued training: the old run's, with longer rows and few, careful steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.config.load import load
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.extend.methods import position_overrides, trained_context
from andromeda.optim import find_optimizer
from andromeda.optim.param_groups import ROLES
from andromeda.utils.errors import ConfigError

DEFAULT_TAIL = 256
"""Scored targets where the trained context has room for them."""


@dataclass(frozen=True)
class ExtendRequest:
    """What a user asks for, the method excepted."""

    run: str
    """The trained run's folder."""
    to: int
    """Tokens of the new context."""
    steps: int = 100
    """Steps of continued training; 0 is none."""
    rate: float = 0.1
    """Learning rates as a share of the old run's."""
    overrides: tuple[str, ...] = ()
    samples: int = 16
    """Held-out windows that are measured."""
    tail: int = 0
    """Targets of each window that are scored at every context length; 0 is 256, or half the trained context if that is less."""
    held_out: str = ""
    """Corpus whose held-out text is measured; empty is the run's own."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"overrides": list(self.overrides)}


def configure(old: RunConfig, wishes: ExtendRequest, method: str) -> RunConfig:
    """The new run's configuration. Raises ConfigError, one sentence."""
    if not 0 < wishes.rate <= 10:
        raise ConfigError(f"--lr-scale {wishes.rate:g} is a factor on the old learning rates: give more than 0 and at most 10.")
    if any(change.partition("=")[0].strip() == "train.steps" for change in wishes.overrides):
        raise ConfigError("Give the steps of the continued training with --steps, from which its schedule follows, not as train.steps.")
    changes = [
        f"name={old.name}-{method}-{wishes.to}",
        *position_overrides(old, wishes.to, method),
        *_training(old, wishes),
        *_rates(old, wishes.rate),
        *wishes.overrides,
    ]
    config = load(wishes.run, changes)
    if config.model.max_seq_len != wishes.to:
        raise ConfigError(f"model.max_seq_len={config.model.max_seq_len} contradicts --to {wishes.to}: leave the override out.")
    check_training(config)
    return config


def tail_length(old: RunConfig, wishes: ExtendRequest) -> int:
    """Targets of each window that are scored. Raises ConfigError when the trained context has no room for them."""
    trained = trained_context(old)
    if wishes.tail > trained:
        raise ConfigError(f"--scored-tokens {wishes.tail} is more than the trained context of {trained} tokens: give fewer.")
    return wishes.tail or max(1, min(DEFAULT_TAIL, trained // 2))


def without_scaling(old: RunConfig, wishes: ExtendRequest) -> RunConfig:
    """The old model as it is, allowed to read as far as asked for. Raises ConfigError where its xPos cannot."""
    return load(wishes.run, position_overrides(old, wishes.to, "none"))


def corpus_of(path: str | Path) -> str:
    """A corpus path as an override's value."""
    return f"data.corpus={Path(path)}"


def _training(old: RunConfig, wishes: ExtendRequest) -> list[str]:
    """As many tokens a step as before, at a rate that rises for a tenth of the steps and falls to zero over their second half."""
    steps, trained = max(1, wishes.steps), trained_context(old)
    batch = max(1, round(old.train.batch_size * trained / wishes.to))
    room = max(1, (old.train.micro_batch_size or old.train.batch_size) * trained // wishes.to)
    micro = max(rows for rows in range(1, batch + 1) if batch % rows == 0 and rows <= room)
    return [
        f"train.steps={steps}",
        f"train.seq_len={wishes.to}",
        f"train.batch_size={batch}",
        f"train.micro_batch_size={micro}",
        "train.schedule.kind=wsd",
        f"train.schedule.warmup={steps // 10}",
        f"train.schedule.cooldown={steps // 2}",
        "train.schedule.min_lr_ratio=0.0",
        "train.window.start=0",
        "train.window.end=0",
        f"train.eval_every={steps if old.train.eval_every else 0}",
        f"train.checkpoints.every={max(1, steps // 4)}",
        # Behind a mask no token would be further from another than its document is long, and little would be learned of far positions.
        "data.document_mask=false",
    ]


def _rates(old: RunConfig, share: float) -> list[str]:
    optim = old.train.optim
    kind, _ = find_optimizer(optim)
    # A key of 0 that stands for `lr` stays 0.
    defaults = {f"{role}_lr": kind.default_lrs.get(role, 0.0) for role in ROLES if role != "matrix"}
    rates = {"lr": optim.lr} | {key: getattr(optim, key) or default for key, default in defaults.items()}
    return [f"train.optim.{key}={share * rate}" for key, rate in rates.items()]
