"""A run from its configuration to its last checkpoint: what `andromeda train` does."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from andromeda.config.keys import flatten
from andromeda.config.run import RunConfig
from andromeda.data.loader import Stream, open_stream
from andromeda.errors import ConfigError
from andromeda.train import checkpoint
from andromeda.train.device import find_device
from andromeda.train.folder import RunFolder
from andromeda.train.loop import Loop, Surroundings
from andromeda.train.manifest import start_entry
from andromeda.train.metrics import MetricsFile, build_sinks, check_extras
from andromeda.train.probes import build_probes
from andromeda.train.screen import Screen, Silent
from andromeda.train.session import Session, build_session
from andromeda.train.signals import Signals
from andromeda.train.speed import Speed
from andromeda.train.validation import NoValidation, Validation

FREE = (
    "name",
    "data.corpus",
    "data.workers",
    "train.device",
    "train.compile",
    "train.checkpointing",
    "train.micro_batch",
    "train.eval_every",
    "train.eval_tokens",
    "train.checkpoints",
    "train.probes",
    "train.log",
)
"""Keys (and tables) that a resumed run may change: none of them decides what is learned. The data's fingerprint guards its path."""


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    folder: Path
    step: int
    steps: int
    signal: int | None
    """The signal that ended it before the last step."""


def train(config: RunConfig, out: str | Path, *, resume: bool = False, screen: Screen | None = None) -> Result:
    """Train `config` in the run folder `out`, or go on with the run that is there.

    Raises an AndromedaError, one sentence, for anything that cannot work; a new folder is made only when all else is right.
    """
    folder, screen, signals = RunFolder(out), screen or Silent(), Signals()
    changes = _changes(folder, config, resume)
    check_extras(config)
    stream, validation = open_data(config)
    session = build_session(config, find_device(config.train.device), stream.fingerprint)
    probes = build_probes(config, stream)
    folder.create()
    folder.lock()
    try:
        with signals.caught():
            _changes(folder, config, resume)  # again, now that no other process can begin a run here
            kept = _restore(session, folder, screen)
            metrics = MetricsFile(folder.metrics_file)  # before the start is recorded, which it may prevent
            identity = _record(config, folder, session, changes)
            if stream.tokenizer:
                # A run writes text without its corpus.
                stream.tokenizer.save(folder.path / "tokenizer")
            sinks = build_sinks(config, folder, session.cursor.step, identity)
            metrics.cut(kept)
            speed = Speed(config.model, stream_length(config), session.precision)
            try:
                Loop(config, session, Surroundings(folder, stream, validation, probes, metrics, sinks, screen, signals, speed)).run()
            finally:
                for sink in (metrics, *sinks):
                    sink.close()
    finally:
        folder.unlock()
    if signals.received:
        name = Signals.name(signals.received)
        screen.note(f"stopped by {name} after step {session.cursor.step}, which is saved: go on with --resume --out {folder.path}")
    return Result(folder.path, session.cursor.step, config.train.steps, signals.received)


def stream_length(config: RunConfig) -> int:
    """Tokens of a row."""
    return config.train.sequence or config.model.context


def open_data(config: RunConfig) -> tuple[Stream, NoValidation]:
    """What a run reads: its training rows, and the held-out ones.

    Raises an AndromedaError where the corpus is missing, damaged, or has tokens that the model has no vector for.
    """
    stream = open_stream(config.data, stream_length(config), config.seed)
    if stream.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The corpus has {stream.vocab_size} tokens and the model {config.model.vocab_size}: "
            f"set model.vocab_size={stream.vocab_size} or more."
        )
    return stream, build_validation(config) if config.train.eval_every else NoValidation()


def _changes(folder: RunFolder, config: RunConfig, resume: bool) -> list[str]:
    """Keys that differ from the run in `folder`. Raises ConfigError when there must be no run, or another one."""
    if not folder.exists:
        if resume and folder.path.exists():
            raise ConfigError(f"There is no run in {folder.path} to resume: leave out --resume to begin one.")
        if resume:
            raise ConfigError(f"There is no run folder {folder.path}: give the right one with --out, or leave out --resume to begin one.")
        folder.refuse_others()
        return []
    if not resume:
        raise ConfigError(f"{folder.path} already holds a run: add --resume to go on with it, or give another folder with --out.")
    old, new = flatten(folder.config().model_dump()), flatten(config.model_dump())
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    refused = sorted(key for key in changed if not is_free(key))
    if refused:
        told = "; ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in refused[:5])
        raise ConfigError(f"The run in {folder.path} was begun with another configuration ({told}): give the old values, or another --out.")
    return sorted(changed)


def is_free(key: str) -> bool:
    """Whether a resumed run may change a key."""
    return any(key == free or key.startswith(free + ".") for free in FREE)


def build_validation(config: RunConfig) -> Validation:
    """What a run of this configuration is validated on."""
    train, sequence = config.train, stream_length(config)
    # Its rows lie apart, which reading ahead does not expect.
    held_out = open_stream(config.data.model_copy(update={"workers": 0}), sequence, config.seed, "val")
    return Validation(held_out, train.eval_tokens, sequence, train.micro_batch or train.batch, config.data.document_mask)


def _restore(session: Session, folder: RunFolder, screen: Screen) -> int:
    """Take back the newest intact checkpoint, if there is one, setting damaged ones aside; returns the bytes of its metrics."""
    newest = checkpoint.latest(folder.checkpoints, screen.note)
    if newest is None:
        return 0
    snapshot = checkpoint.read(newest)
    session.restore(snapshot)
    checkpoint.set_aside_newer(newest)
    screen.note(f"going on from step {snapshot.step}")
    return snapshot.values["metrics_bytes"]


def _record(config: RunConfig, folder: RunFolder, session: Session, changes: list[str]) -> str:
    """Write the configuration and this start into the folder; returns the run's identity."""
    manifest = folder.manifest() or {"identity": uuid.uuid4().hex[:12], "seed": config.seed, "data": session.fingerprint, "starts": []}
    folder.write_config(config)
    manifest["starts"].append(start_entry(session.cursor.step, session.precision.device, changes))
    folder.write_manifest(manifest)
    return manifest["identity"]
