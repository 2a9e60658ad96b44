"""The training loop: data, step, figures, checkpoints, and what happens when something goes wrong."""

from __future__ import annotations

import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from andromeda.config.keys import flatten
from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream, open_stream
from andromeda.optim import build_schedule
from andromeda.optim.schedules import build_window
from andromeda.train import checkpoint
from andromeda.train.callbacks.diagnostics import Health
from andromeda.train.callbacks.probes import Probes, build_probes
from andromeda.train.callbacks.validation import NoValidation, Validation
from andromeda.train.manifest import start_entry
from andromeda.train.metrics import MetricsFile, Sink, Speed, build_sinks, check_extras
from andromeda.train.objective import NextToken, Rows
from andromeda.train.progress import Screen, Silent
from andromeda.train.run_dir import RunFolder
from andromeda.train.signals import Signals
from andromeda.train.state import Session, build_session, find_device
from andromeda.train.step import Stepper, Work
from andromeda.utils.errors import AndromedaError, ConfigError


class TrainingFailed(AndromedaError):
    """A run that cannot go on by itself. Its last healthy checkpoint is on disk."""

    exit_code = 1


@dataclass
class Surroundings:
    """What the loop reads from and writes to."""

    folder: RunFolder
    stream: TokenStream
    validation: NoValidation
    probes: Probes
    metrics: MetricsFile
    sinks: list[Sink]
    screen: Screen
    signals: Signals
    speed: Speed


class Loop:
    """One process's share of a run, from where `session` is to the last step or a signal."""

    def __init__(self, config: RunConfig, session: Session, around: Surroundings) -> None:
        train = config.train
        self._config, self._train, self._session, self._around = config, train, session, around
        self._factor = build_schedule(train.schedule, train.steps)
        self._window = build_window(train.window, train.steps)
        self._objective = NextToken(session.model, train.z_loss)
        self._step = Stepper(session, self._objective, train)
        self._health = Health(session.model, session.precision)
        self._saved = session.cursor.step

    def run(self) -> None:
        """Train until the last step or a signal; the state is on disk when this returns."""
        if not checkpoint.listed(self._around.folder.checkpoints):
            # At once, so that a disk that cannot hold a checkpoint is found out now and not hours later.
            self._save()
        while self._session.cursor.step < self._train.steps and not self._around.signals.received:
            self._advance()
            self._observe()
            if self._session.guard.exhausted:
                self._roll_back()
        if self._saved != self._session.cursor.step:
            self._save()

    def _advance(self) -> None:
        """One step of the run."""
        session, cursor, size = self._session, self._session.cursor, self._train.batch_size
        first = session.guard.next_row(cursor.rows)
        with self._around.speed.running(cursor):
            batch = self._around.stream.batch(first, size)
        work = Work(Rows.of(batch, self._config.data.document_mask), batch.tokens, (first, first + size), self._window(cursor.step))
        session.optimizer.set_factor(self._factor(cursor.step), cursor.step)
        watched = self._due(self._train.log.diagnostics_every, cursor.step + 1)
        with self._health.watching(work.rows) if watched else nullcontext(), self._around.speed.running(cursor):
            outcome = self._step(work)
        self._around.speed.count(size, work.window)
        cursor.step, cursor.rows = cursor.step + 1, first + size
        if outcome.bad is None:
            cursor.tokens += batch.tokens
            session.meter.add(outcome.nll, outcome.norm, batch.tokens, batch.bytes)
        else:
            self._write({"event": f"step not taken: {outcome.bad}", "rows": [first, first + size]})

    def _observe(self) -> None:
        """Figures and checkpoints that are due after this step."""
        session, step, train = self._session, self._session.cursor.step, self._train
        if self._due(train.log.every, step):
            self._write(self._figures())
        if self._due(train.log.diagnostics_every, step):
            self._write(self._health.figures)
        if self._due(train.eval_every, step):
            validate = partial(self._around.validation, session.model, self._objective, session.precision)
            self._write(validate() | session.average.figures(validate))
        if self._due(train.probes.every, step):
            self._write(self._around.probes(session.model, session.precision))
        every = train.checkpoints.every
        # A checkpoint between two bad steps would be one that a rollback cannot use: it waits for a good step.
        if every and step // every > self._saved // every and session.guard.healthy:
            self._save()

    def _due(self, every: int, step: int) -> bool:
        """Whether what happens `every` steps (0: never) happens after this one; all of it happens after the last."""
        return bool(every) and (step == self._train.steps or step % every == 0)

    def _figures(self) -> dict[str, Any]:
        session = self._session
        rates = {f"lr/{role}": rate for role, rate in session.optimizer.learning_rates().items()}
        # The meter first: taking its figures waits for the device, and the watch must not stop before that.
        figures = session.meter.take()
        cursor = session.cursor
        return figures | rates | {"tokens": cursor.tokens, "rows": cursor.rows} | self._around.speed.take() | {"seconds": cursor.seconds}

    def _write(self, figures: dict[str, Any]) -> None:
        if not figures:
            return
        for sink in (self._around.metrics, *self._around.sinks, self._around.screen):
            sink.write(self._session.cursor.step, figures)

    def _save(self) -> None:
        folder = self._around.folder.checkpoints
        checkpoint.save(folder, self._session.snapshot(self._around.metrics.kept()))
        checkpoint.prune(folder, self._train.checkpoints.keep)
        self._saved = self._session.cursor.step

    def _roll_back(self) -> None:
        """Back to the last healthy checkpoint, with the rows of the bad steps passed over from now on."""
        session, screen = self._session, self._around.screen
        step, (rollbacks, skips) = session.cursor.step, session.guard.pass_over()
        if session.guard.gives_up:
            raise TrainingFailed(
                f"{self._train.spike_guard.patience} steps in a row up to step {step} could not be taken, "
                f"after {session.guard.rollbacks} rollbacks: "
                f"lower train.optim.lr or look at the data; the last healthy checkpoint is in {self._around.folder.checkpoints}."
            )
        healthy = (
            path for path in checkpoint.intact(self._around.folder.checkpoints, screen.note) if checkpoint.read_values(path)["healthy"]
        )
        path = next(healthy, None)
        if path is None:
            raise TrainingFailed(
                f"The run must go back from step {step}, and no healthy checkpoint is left in {self._around.folder.checkpoints}."
            )
        checkpoint.set_aside_newer(path)  # or a later start would go on from them
        snapshot = checkpoint.read(path)
        session.restore(snapshot)
        self._saved = snapshot.step
        session.guard.rollbacks, session.guard.skips = rollbacks, skips
        self._around.metrics.cut(snapshot.values["metrics_bytes"])
        self._write({"event": f"rolled back from step {step}", "rows_passed_over": skips})


FREE = (
    "name",
    "data.corpus",
    "data.workers",
    "train.device",
    "train.compile",
    "train.activation_checkpointing",
    "train.micro_batch_size",
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
    return config.train.seq_len or config.model.max_seq_len


def open_data(config: RunConfig) -> tuple[TokenStream, NoValidation]:
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
    return Validation(held_out, train.eval_tokens, sequence, train.micro_batch_size or train.batch_size, config.data.document_mask)


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
