"""Configuration of a supervised fine-tuning: that of the trained run, with chat data, few steps and small learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from andromeda.config.load import load
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.config.vocabulary import padded
from andromeda.data.loader import open_stream
from andromeda.train.continued import scaled_rates, short_schedule
from andromeda.train.trainer import resolve_seq_len
from andromeda.utils.errors import ConfigError


@dataclass(frozen=True)
class TuneSchedule:
    """How long and how fast a tuning learns."""

    epochs: float = 3.0
    """Times that every example is seen."""
    steps: int = 0
    """In place of epochs; 0 follows from those."""
    lr_scale: float = 0.1
    """Factor on the learning rates of the trained run."""

    def check(self, overrides: Sequence[str]) -> None:
        """Raise ConfigError, one sentence, for values that cannot be."""
        if not 0 < self.lr_scale <= 10:
            raise ConfigError(f"--lr-scale {self.lr_scale:g} is a factor on the old learning rates: give more than 0 and at most 10.")
        if not (0 < self.epochs <= 10_000 and self.steps >= 0):
            raise ConfigError("Give --epochs of more than 0 and at most 10,000, or --steps of at least 1.")
        if any(change.partition("=")[0].strip() == "train.steps" for change in overrides):
            raise ConfigError("Give --steps, from which the schedule follows, not train.steps.")


def sequence_length(run: Path, overrides: Sequence[str]) -> int:
    """Tokens of a sequence of the tuning."""
    return resolve_seq_len(load(str(run), [change for change in overrides if change.startswith(("train.seq_len", "model."))]))


def configure(run: Path, corpus: Path, entries: int, schedule: TuneSchedule, overrides: Sequence[str]) -> RunConfig:
    """The new run's configuration. corpus: the chat corpus, already written; entries: of its tokenizer. Raises ConfigError."""
    old = load(str(run))
    fixed = [*_data(old, run, corpus, entries), *scaled_rates(old.train.optim, schedule.lr_scale)]
    draft = load(str(run), [*fixed, *overrides])
    rows = _rows(draft)
    batch = [] if any(change.startswith(("train.batch_size", "train.micro_batch_size")) for change in overrides) else _batch(old, rows)
    size = load(str(run), [*fixed, *batch, *overrides]).train.batch_size
    steps = schedule.steps or max(1, math.ceil(schedule.epochs * rows / size))
    config = load(str(run), [*fixed, *batch, *short_schedule(steps), f"train.eval_every={max(1, steps // 4)}", *overrides])
    check_training(config)
    return config


def _data(old: RunConfig, run: Path, corpus: Path, entries: int) -> list[str]:
    """Whole examples share a sequence, and none sees another."""
    grown = [f"model.vocab_size={padded(entries, old.model.vocab_size)}"] if entries > old.model.vocab_size else []
    return [
        f"name={run.resolve().name}-sft",
        f"data.corpus={corpus}",
        *(["data.sources=[]"] if old.data.sources else []),
        "data.packing=documents",
        "data.document_mask=true",
        "data.by_size=false",
        "data.augment.fim=0.0",
        "data.augment.mask=0.0",
        *grown,
    ]


def _rows(config: RunConfig) -> int:
    """Sequences in which every example comes once."""
    return round(1 / open_stream(config.data, resolve_seq_len(config), config.seed).epochs(1)[0])


def _batch(old: RunConfig, rows: int) -> list[str]:
    """The old run's batch, or less where the data is so little that an epoch would have fewer than eight steps."""
    size = max(1, min(old.train.batch_size, rows // 8))
    room = min(size, old.train.micro_batch_size or old.train.batch_size)
    micro = max(n for n in range(1, room + 1) if size % n == 0)
    return [f"train.batch_size={size}", f"train.micro_batch_size={micro}"]
