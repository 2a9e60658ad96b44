"""The training loop: data, steps, metrics, checkpoints, and recovery from loss spikes, signals and damaged checkpoints."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from andromeda.config.keys import flatten
from andromeda.config.own_code import allow_code as consent
from andromeda.config.parts import check_code_allowed
from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream, open_stream
from andromeda.optim import build_schedule
from andromeda.optim.schedules import build_window_warmup
from andromeda.train import checkpoint
from andromeda.train.callbacks.diagnostics import Diagnostics
from andromeda.train.callbacks.probes import Probes, build_probes
from andromeda.train.callbacks.validation import Validation
from andromeda.train.manifest import start_entry
from andromeda.train.metrics import (
    MetricsFile,
    MetricsLogger,
    ThroughputMonitor,
    build_loggers,
    check_loggers_installed,
    sha256_prefix,
)
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.progress import MetricValues, NullReporter, Reporter
from andromeda.train.run_dir import RunDir
from andromeda.train.signals import SignalHandler
from andromeda.train.state import TrainState, build_train_state, resolve_device
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.errors import AndromedaError, CheckpointError, ConfigError
from andromeda.utils.untrusted import MalformedFile


class TrainingFailed(AndromedaError):
    """A run that cannot continue by itself. Its last healthy checkpoint is on disk."""

    exit_code = 1


@dataclass
class RunIO:
    """What the trainer reads from and writes to."""

    run_dir: RunDir
    stream: TokenStream
    validation: Validation | None
    probes: Probes
    metrics_file: MetricsFile
    loggers: list[MetricsLogger]
    reporter: Reporter
    signals: SignalHandler
    throughput: ThroughputMonitor


class Trainer:
    """Runs the training loop of one process, from the step that `state` is at to the last step or a signal."""

    def __init__(self, config: RunConfig, state: TrainState, io: RunIO) -> None:
        train = config.train
        self._config, self._train, self._state, self._io = config, train, state, io
        self._lr_factor = build_schedule(train.schedule, train.steps)
        self._window = build_window_warmup(train.window, train.steps)
        self._objective = NextTokenObjective(state.model, train.z_loss)
        self._step = TrainStep(state, self._objective, train)
        self._diagnostics = Diagnostics(state.model, state.precision)
        self._saved_step = state.progress.step
        self._periodic: list[tuple[int, Callable[[], MetricValues]]] = [
            (train.log.every, self._step_metrics),
            (train.log.diagnostics_every, lambda: self._diagnostics.metrics),
            (train.eval_every, self._validate),
            (train.probes.every, lambda: io.probes(state.model, state.precision)),
        ]

    def run(self) -> None:
        """Train until the last step or a signal; the state is on disk when this returns."""
        if not checkpoint.list_all(self._io.run_dir.checkpoints):
            # At once, so that a disk that cannot hold a checkpoint is found out now and not hours later.
            self._save()
        while self._state.progress.step < self._train.steps and not self._io.signals.received:
            self._train_step()
            self._after_step()
            if self._state.spike_guard.must_roll_back:
                self._roll_back()
        if self._saved_step != self._state.progress.step:
            self._save()

    def _train_step(self) -> None:
        state, progress, batch_size = self._state, self._state.progress, self._train.batch_size
        first = state.spike_guard.next_row(progress.rows)
        with self._io.throughput.measure(progress):
            batch = self._io.stream.batch(first, batch_size)
        data = MicroBatch.from_batch(batch, self._config.data.document_mask)
        step_batch = StepBatch(data, batch.tokens, (first, first + batch_size), self._window(progress.step))
        state.optimizer.set_lr_factor(self._lr_factor(progress.step), progress.step)
        diagnosed = self._is_due(self._train.log.diagnostics_every, progress.step + 1)
        with self._diagnostics.measure(data) if diagnosed else nullcontext(), self._io.throughput.measure(progress):
            result = self._step(step_batch)
        self._io.throughput.add_sequences(batch_size, step_batch.window)
        progress.step, progress.rows = progress.step + 1, first + batch_size
        if result.skip_reason is None:
            progress.tokens += batch.tokens
            state.metrics.add(result.nll, result.grad_norm, batch.tokens, batch.bytes)
        else:
            self._log({"event": f"step skipped: {result.skip_reason}", "rows": [first, first + batch_size]})

    def _after_step(self) -> None:
        """Metrics and the checkpoint that are due after this step."""
        for every, metrics in self._periodic:
            if self._is_due(every, self._state.progress.step):
                self._log(metrics())
        every = self._train.checkpoints.every
        # No checkpoint between two bad steps: a rollback could not use it. It waits for a good step.
        if every and self._state.progress.step // every > self._saved_step // every and self._state.spike_guard.healthy:
            self._save()

    def _is_due(self, every: int, step: int) -> bool:
        """Whether what happens every `every` steps (0: never) happens after this one; all of it happens after the last step."""
        return bool(every) and (step == self._train.steps or step % every == 0)

    def _step_metrics(self) -> MetricValues:
        state = self._state
        lrs = {f"lr/{role}": lr for role, lr in state.optimizer.learning_rates().items()}
        # The accumulator first: it waits for the device, and the throughput's clock must not be read before that.
        metrics = state.metrics.compute_and_reset()
        progress = state.progress
        counts = {"tokens": progress.tokens, "rows": progress.rows}
        return metrics | lrs | counts | self._io.throughput.compute_and_reset() | {"seconds": progress.seconds}

    def _validate(self) -> MetricValues:
        state = self._state
        if self._io.validation is None:
            return {}
        validate = partial(self._io.validation, state.model, self._objective, state.precision)
        return validate() | (state.ema.evaluate(validate) if state.ema else {})

    def _log(self, metrics: MetricValues) -> None:
        if not metrics:
            return
        for logger in (self._io.metrics_file, *self._io.loggers, self._io.reporter):
            logger.log(self._state.progress.step, metrics)

    def _save(self) -> None:
        checkpoints = self._io.run_dir.checkpoints
        checkpoint.save(checkpoints, self._state.snapshot(self._io.metrics_file.checkpoint_info()))
        checkpoint.prune(checkpoints, self._train.checkpoints.keep)
        self._saved_step = self._state.progress.step

    def _roll_back(self) -> None:
        """Restore the last healthy checkpoint and skip the rows of the bad steps from now on."""
        state, guard = self._state, self._state.spike_guard
        step, (rollbacks, skipped_rows) = state.progress.step, guard.after_rollback()
        if guard.out_of_rollbacks:
            raise TrainingFailed(
                f"{self._train.spike_guard.patience} steps in a row up to step {step} were skipped, after {guard.rollbacks} rollbacks: "
                f"lower train.optim.lr or look at the data; the last healthy checkpoint is in {self._io.run_dir.checkpoints}."
            )
        snapshot = self._last_healthy_snapshot()
        state.restore(snapshot)
        self._saved_step = snapshot.step
        guard.rollbacks, guard.skipped_rows = rollbacks, skipped_rows
        self._io.metrics_file.truncate(snapshot.metadata["metrics_bytes"])
        self._log({"event": f"rolled back from step {step}", "rows_skipped": skipped_rows})

    def _last_healthy_snapshot(self) -> checkpoint.Snapshot:
        """Raises TrainingFailed where there is none."""
        checkpoints = self._io.run_dir.checkpoints
        for path in checkpoint.iter_intact(checkpoints, self._io.reporter.message):
            if checkpoint.read_metadata(path)["healthy"]:
                checkpoint.set_aside_newer(path)  # or a later start would resume from them
                return checkpoint.read(path)
        raise TrainingFailed(
            f"The run must roll back from step {self._state.progress.step}, and no healthy checkpoint is left in {checkpoints}."
        )


MAY_CHANGE_ON_RESUME = (
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
    "parallel",
)
"""Keys and tables that a resumed run may change: none of them affects what is learned. The data's fingerprint guards its path."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    steps: int
    signal: int | None
    """The signal that stopped it before the last step."""


def train(
    config: RunConfig, out: str | Path, *, resume: bool = False, reporter: Reporter | None = None, allow_code: bool = False
) -> TrainResult:
    """Train `config` in the run folder `out`, or resume the run that is there.

    allow_code: import the classes of a user's own that the configuration names. Raises an AndromedaError, one sentence, for anything
    that cannot work; a new folder is created only after all checks have passed.
    """
    with consent(allow_code):
        return _train(config, out, resume, reporter or NullReporter())


def _train(config: RunConfig, out: str | Path, resume: bool, reporter: Reporter) -> TrainResult:
    run_dir, signals = RunDir(out), SignalHandler()
    check_code_allowed(config)
    changes = _changed_keys(run_dir, config, resume)
    check_loggers_installed(config)
    stream, validation = open_streams(config)
    state = build_train_state(config, resolve_device(config.train.device), stream.fingerprint)
    probes = build_probes(config, stream)
    run_dir.create()
    run_dir.lock()
    try:
        with signals.installed():
            _changed_keys(run_dir, config, resume)  # again, now that no other process can start a run here
            snapshot = _resume_latest(state, run_dir, reporter)
            lost = set_aside_changed_metrics(run_dir, snapshot.metadata) if snapshot else ""
            metrics_file = MetricsFile(run_dir.metrics_file)  # before the start is recorded: opening it may fail
            identity = _record_start(config, run_dir, state, changes)
            if stream.tokenizer:
                # So that the run generates text without its corpus.
                stream.tokenizer.save(run_dir.path / "tokenizer")
            loggers = build_loggers(config, run_dir, state.progress.step, identity)
            metrics_file.truncate(snapshot.metadata.get("metrics_bytes", 0) if snapshot and not lost else 0)
            if lost:
                reporter.message(lost)
                metrics_file.log(state.progress.step, {"event": f"{METRICS_LOST}: {lost}"})
            throughput = ThroughputMonitor(config.model, resolve_seq_len(config), state.precision)
            io = RunIO(run_dir, stream, validation, probes, metrics_file, loggers, reporter, signals, throughput)
            try:
                Trainer(config, state, io).run()
            finally:
                for logger in (metrics_file, *loggers):
                    logger.close()
    finally:
        run_dir.unlock()
    if signals.received:
        name = SignalHandler.signal_name(signals.received)
        reporter.message(f"stopped by {name} after step {state.progress.step}, which is saved: resume with --resume --out {run_dir.path}")
    return TrainResult(run_dir.path, state.progress.step, config.train.steps, signals.received)


def resolve_seq_len(config: RunConfig) -> int:
    """Tokens of a training sequence."""
    return config.train.seq_len or config.model.max_seq_len


def open_streams(config: RunConfig) -> tuple[TokenStream, Validation | None]:
    """What a run reads: its training stream, and the held-out one unless `train.eval_every` is 0.

    Raises an AndromedaError where the corpus is missing or damaged, or has tokens outside the model's vocabulary.
    """
    stream = open_stream(config.data, resolve_seq_len(config), config.seed)
    if stream.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The corpus has {stream.vocab_size} tokens and the model {config.model.vocab_size}: "
            f"set model.vocab_size={stream.vocab_size} or more."
        )
    return stream, build_validation(config) if config.train.eval_every else None


def _changed_keys(run_dir: RunDir, config: RunConfig, resume: bool) -> list[str]:
    """Keys that differ from the run in `run_dir`. Raises ConfigError where a run may not be started or resumed."""
    if not run_dir.exists:
        if resume and run_dir.path.exists():
            raise ConfigError(f"There is no run in {run_dir.path} to resume: leave out --resume to start one.")
        if resume:
            raise ConfigError(f"There is no run folder {run_dir.path}: give the right one with --out, or leave out --resume to start one.")
        run_dir.refuse_foreign_files()
        return []
    if not resume:
        raise ConfigError(f"{run_dir.path} already holds a run: add --resume to continue it, or give another folder with --out.")
    old, new = flatten(run_dir.config().model_dump()), flatten(config.model_dump())
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    refused = sorted(key for key in changed if not may_change_on_resume(key))
    if refused:
        details = "; ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in refused[:5])
        raise ConfigError(
            f"The run in {run_dir.path} was started with another configuration ({details}): give the old values, or another --out."
        )
    return sorted(changed)


def changed_since(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Differences between a configuration and the one that a checkpoint holds which a resumed run may not have, each in words."""
    old, new = flatten(saved), flatten(json.loads(json.dumps(config.model_dump())))
    default = flatten(json.loads(json.dumps(RunConfig().model_dump())))
    # A key that only one of them has is of another version of Andromeda, unless it is of a part with keys of its own or was set.
    own = {key for key in old.keys() - new.keys() if key.startswith(OWN_TABLES)}
    added = {key for key in new.keys() - old.keys() if new[key] != default.get(key)}
    apart = {key for key in old.keys() & new.keys() if old[key] != new[key]} | own | added
    return [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in sorted(apart) if not may_change_on_resume(key)]


def refuse_other_config(run_dir: RunDir, config: RunConfig, snapshot: checkpoint.Snapshot) -> None:
    """Raises CheckpointError where config.toml was edited since the checkpoint in keys that decide what is learned."""
    changed = changed_since(config, snapshot.metadata.get("config") or {}) if "config" in snapshot.metadata else []
    if changed:
        raise CheckpointError(
            f"{run_dir.config_file} was changed since the checkpoint of step {snapshot.step} ({'; '.join(changed[:5])}): "
            "restore the old values, or train in another folder."
        )


METRICS_LOST = "metrics lost"
"""How the event begins that a resumed run records in place of metrics that were deleted or changed."""


def set_aside_changed_metrics(run_dir: RunDir, metadata: Mapping[str, Any]) -> str:
    """Set metrics.jsonl aside where it does not begin with what the checkpoint recorded; returns what is wrong with it, or nothing."""
    path, size = run_dir.metrics_file, metadata.get("metrics_bytes", 0)
    if path.is_dir() and not path.is_symlink():
        return ""  # not a log that was changed: opening it says what to do
    try:
        found = path.stat().st_size
        if found >= size and metadata.get("metrics_sha256") in (None, sha256_prefix(path, size)):
            return ""
        reason = "was changed" if found >= size else f"has {found} bytes instead of {size}"
    except FileNotFoundError:
        return f"{path.name} is missing; a new one begins" if size else ""
    except MalformedFile as error:
        reason = str(error)
    aside = path.with_name(f"damaged-{path.name}")
    os.rename(path, aside)
    return f"{path.name} {reason} since the checkpoint; it is now {aside.name}, and a new one begins"


OWN_TABLES = ("model.mixers", "model.attention.qk_norm", "model.value_embedding", "train.optim.options")
"""Tables that may have keys of a user's own part."""


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run may change a key."""
    return any(key == free or key.startswith(free + ".") for free in MAY_CHANGE_ON_RESUME)


def build_validation(config: RunConfig) -> Validation:
    """The validation that a run of this configuration uses."""
    train, seq_len = config.train, resolve_seq_len(config)
    # Without workers: they prefetch consecutive rows, and validation reads rows that are far apart.
    held_out = open_stream(config.data.model_copy(update={"workers": 0}), seq_len, config.seed, "val")
    return Validation(held_out, train.eval_tokens, seq_len, train.micro_batch_size or train.batch_size, config.data.document_mask)


def _resume_latest(state: TrainState, run_dir: RunDir, reporter: Reporter) -> checkpoint.Snapshot | None:
    """Restore the newest intact checkpoint, if there is one, and return it, setting damaged ones aside."""
    newest = checkpoint.latest(run_dir.checkpoints, reporter.message)
    if newest is None:
        return None
    snapshot = checkpoint.read(newest)
    refuse_other_config(run_dir, state.config, snapshot)
    state.restore(snapshot)
    checkpoint.set_aside_newer(newest)
    reporter.message(f"resuming from step {snapshot.step}")
    return snapshot


def _record_start(config: RunConfig, run_dir: RunDir, state: TrainState, changes: list[str]) -> str:
    """Write the configuration and this start into the run folder; returns the run's identity."""
    manifest: dict[str, Any] = run_dir.manifest() or {
        "identity": uuid.uuid4().hex[:12],
        "seed": config.seed,
        "data": state.data_fingerprint,
        "starts": [],
    }
    run_dir.write_config(config)
    manifest["starts"].append(start_entry(state.progress.step, state.precision.device, changes))
    run_dir.write_manifest(manifest)
    return str(manifest["identity"])
