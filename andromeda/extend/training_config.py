"""Configuration of the continued training: that of the old run, with longer sequences, few steps and small learning rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.config.load import load
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.extend.methods import position_overrides, trained_context
from andromeda.train.continued import scaled_rates, short_schedule
from andromeda.utils.errors import ConfigError

DEFAULT_TAIL = 256
"""Scored targets per window, if the trained context is long enough."""


@dataclass(frozen=True)
class ExtendRequest:
    """Arguments of an extension, except the method."""

    run: str
    """The trained run's folder."""
    to: int
    """Tokens of the new context."""
    steps: int = 100
    """Steps of continued training; 0 only evaluates."""
    lr_scale: float = 0.1
    """Factor on the old run's learning rates."""
    overrides: tuple[str, ...] = ()
    samples: int = 16
    """Held-out windows that are evaluated."""
    tail: int = 0
    """Targets of each window that are scored at every context length; 0 is 256, or half the trained context if that is less."""
    held_out: str = ""
    """Corpus whose held-out text is evaluated; empty is the run's own."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"overrides": list(self.overrides)}


def configure(old: RunConfig, request: ExtendRequest, method: str) -> RunConfig:
    """The new run's configuration. Raises ConfigError, one sentence."""
    if not 0 < request.lr_scale <= 10:
        raise ConfigError(f"--lr-scale {request.lr_scale:g} is a factor on the old learning rates: give more than 0 and at most 10.")
    if any(change.partition("=")[0].strip() == "train.steps" for change in request.overrides):
        raise ConfigError("Give the steps of the continued training with --steps, from which its schedule follows, not as train.steps.")
    changes = [
        f"name={old.name}-{method}-{request.to}",
        *position_overrides(old, request.to, method),
        *_training(old, request),
        *scaled_rates(old.train.optim, request.lr_scale),
        *request.overrides,
    ]
    config = load(request.run, changes)
    if config.model.max_seq_len != request.to:
        raise ConfigError(f"model.max_seq_len={config.model.max_seq_len} contradicts --to {request.to}: leave the override out.")
    check_training(config)
    return config


def tail_length(old: RunConfig, request: ExtendRequest) -> int:
    """Scored targets per window. Raises ConfigError if the trained context is shorter."""
    trained = trained_context(old)
    if request.tail > trained:
        raise ConfigError(f"--scored-tokens {request.tail} is more than the trained context of {trained} tokens: give fewer.")
    return request.tail or max(1, min(DEFAULT_TAIL, trained // 2))


def without_scaling(old: RunConfig, request: ExtendRequest) -> RunConfig:
    """The old model with a longer max_seq_len and unscaled positions. Raises ConfigError if its xPos overflows there."""
    return load(request.run, position_overrides(old, request.to, "none"))


def corpus_of(path: str | Path) -> str:
    """A corpus path as an override's value."""
    return f"data.corpus={Path(path)}"


def _training(old: RunConfig, request: ExtendRequest) -> list[str]:
    """As many tokens per step as before; learning rates warm up over a tenth of the steps and decay to zero over the second half."""
    steps, trained = max(1, request.steps), trained_context(old)
    batch = max(1, round(old.train.batch_size * trained / request.to))
    room = max(1, (old.train.micro_batch_size or old.train.batch_size) * trained // request.to)
    micro = max(rows for rows in range(1, batch + 1) if batch % rows == 0 and rows <= room)
    return [
        *short_schedule(steps),
        f"train.seq_len={request.to}",
        f"train.batch_size={batch}",
        f"train.micro_batch_size={micro}",
        f"train.eval_every={steps if old.train.eval_every else 0}",
        # With a mask no distance would exceed the length of a document, and little would be learned about long distances.
        "data.document_mask=false",
    ]
