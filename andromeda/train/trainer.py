"""The training loop: data, steps, metrics, checkpoints, and recovery from loss spikes, signals and damaged checkpoints."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from andromeda.config.own_code import allow_code as consent
from andromeda.config.parts import check_code_allowed
from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream, open_stream
from andromeda.model.unfused_parts import describe_unfused, unfused_parts
from andromeda.optim import build_schedule
from andromeda.optim.schedules import build_window_warmup
from andromeda.parallel.mesh import ParallelMesh, join_mesh, watched
from andromeda.parallel.preflight import preflight
from andromeda.train import checkpoint
from andromeda.train.build_objective import build_objective, check_head_targets
from andromeda.train.callbacks.diagnostics import Diagnostics
from andromeda.train.callbacks.probes import Probes, build_probes
from andromeda.train.callbacks.samples import Samples, build_samples, write_samples
from andromeda.train.callbacks.validation import Validation
from andromeda.train.checkpoint_ranks import ONE as ONE_RANK
from andromeda.train.checkpoint_ranks import Ranks
from andromeda.train.checkpoint_writer import CheckpointWriter
from andromeda.train.compile import should_compile
from andromeda.train.init_from import ParentCheckpoint, find_parent, fitted, start_from
from andromeda.train.join_workers import join_workers
from andromeda.train.manifest import start_entry
from andromeda.train.metrics import (
    MetricsFile,
    MetricsLogger,
    NullMetricsFile,
    ThroughputMonitor,
    build_loggers,
    check_loggers_installed,
)
from andromeda.train.objective import MicroBatch
from andromeda.train.outcome import explain_poor_loss, unigram_entropy
from andromeda.train.progress import MetricValues, NullReporter, Reporter, StoppingReporter
from andromeda.train.resume import LENGTH, METRICS_LOST, changed_keys, rest_of_schedule, resume_latest, set_aside_changed_metrics
from andromeda.train.run_dir import RunDir
from andromeda.train.signals import SignalHandler
from andromeda.train.start_summary import COMPILING, start_summary
from andromeda.train.state import TrainState, build_train_state, model_tensors, resolve_device
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.errors import AndromedaError, ConfigError

SHOWN = 200
"""Characters of a sample that are shown while training."""


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
    samples: Samples | None
    metrics_file: MetricsFile
    loggers: list[MetricsLogger]
    reporter: Reporter
    signals: SignalHandler
    throughput: ThroughputMonitor


class Trainer:
    """Runs the training loop, from the step that `state` is at to the last step or a signal."""

    def __init__(self, config: RunConfig, state: TrainState, io: RunIO) -> None:
        train = config.train
        self._config, self._train, self._state, self._io = config, train, state, io
        self._lr_factor = build_schedule(train.schedule, train.steps)
        self._window = build_window_warmup(train.window, train.steps)
        self._objective = build_objective(state.model, config, state.balance, io.stream.tokenizer, state.collectives)
        self._step = TrainStep(state, self._objective, train)
        self._collectives = state.collectives
        self._diagnostics = Diagnostics(state.model, state.precision, state.collectives)
        self._saved_step = state.progress.step
        self._warning = ""
        settings, ranks = train.checkpoints, state.ranks
        self._checkpoints = CheckpointWriter(
            io.run_dir.checkpoints, settings.keep, ranks.split() if settings.background else ranks, background=settings.background
        )
        self._periodic: list[tuple[int, Callable[[], MetricValues]]] = [
            (train.log.every, self._step_metrics),
            (train.log.diagnostics_every, lambda: self._diagnostics.metrics),
            (train.eval_every, self._validate),
            (train.probes.every, self._probe),
            (train.samples.every, self._write_samples),
        ]

    def run(self) -> None:
        """Train until the last step or a signal; the state is on disk when this returns."""
        if self._state.ranks.from_first(lambda: not checkpoint.list_all(self._io.run_dir.checkpoints)):
            # At once, so that a disk that cannot hold a checkpoint is found out now and not hours later.
            self._save()
        if self._state.progress.step < self._train.steps and should_compile(self._config, self._state.precision.device):
            self._io.reporter.message(COMPILING)
        while self._state.progress.step < self._train.steps and not self._interrupted():
            self._train_step()
            self._io.reporter.step_done(self._state.progress.step)
            self._after_step()
            if self._state.spike_guard.must_roll_back:
                self._roll_back()
        if self._saved_step != self._state.progress.step:
            self._save()
        self._checkpoints.wait()
        if self._warning:
            self._io.reporter.message(self._warning)

    def _interrupted(self) -> bool:
        """Whether any process was sent a signal, so that all end after the same step."""
        self._io.signals.received = self._collectives.largest(self._io.signals.received or 0) or None
        return self._io.signals.received is not None

    def _train_step(self) -> None:
        state, progress, batch_size = self._state, self._state.progress, self._train.batch_size
        first, before = state.spike_guard.next_row(progress.rows), progress.rows
        # Each worker of DiLoCo reads its own part of the sequences that all of them would read in this step.
        workers = self._train.diloco
        end = first + batch_size * max(1, workers.workers)
        with self._io.throughput.measure(progress):
            own, count = self._collectives.rows(first, batch_size)
            batch = self._io.stream.batch(own + workers.worker * batch_size, count)
            num_targets, num_bytes = map(int, self._collectives.sum_numbers(batch.tokens, batch.bytes))
        data = MicroBatch.from_batch(batch, self._config.data.document_mask)
        step_batch = StepBatch(data, num_targets, (first, end), self._window(progress.step))
        state.optimizer.set_lr_factor(self._lr_factor(progress.step), progress.step)
        diagnosed = self._is_due(self._train.log.diagnostics_every, progress.step + 1)
        with self._diagnostics.measure(data) if diagnosed else nullcontext(), self._io.throughput.measure(progress):
            result = self._step(step_batch)
        self._io.throughput.add_sequences(batch_size, step_batch.window)
        # Added, because a worker that joins the others takes over their progress within the step.
        progress.step, progress.rows = progress.step + 1, progress.rows + end - before
        self._collectives.at(progress.step)
        if result.skip_reason is None:
            progress.tokens += num_targets
            state.metrics.add(result.nll, result.grad_norm, num_targets, num_bytes, result.heads)
        else:
            self._log({"event": f"step skipped: {result.skip_reason}", "rows": [first, end]})

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
        counts = {"tokens": progress.tokens, "rows": progress.rows} | (state.diloco.metrics() if state.diloco else {})
        last = self._judge(metrics.get("loss")) if progress.step == self._train.steps else {}
        return (
            metrics
            | self._objective.metrics()
            | lrs
            | counts
            | self._io.throughput.compute_and_reset()
            | {"seconds": progress.seconds}
            | last
        )

    def _judge(self, loss: float | None) -> MetricValues:
        """What the last line of a finished run adds: the loss of token frequencies alone, and a warning where training did no better."""
        entropy = unigram_entropy(self._io.stream, resolve_seq_len(self._config))
        warning = explain_poor_loss(loss, entropy, self._config.model.vocab_size, self._train.optim.lr)
        self._warning = warning
        return {"unigram_entropy": entropy} | ({"warning": warning} if warning else {})

    def _write_samples(self) -> MetricValues:
        """Samples have a file of their own and no metrics."""
        state, samples, step = self._state, self._io.samples, self._state.progress.step
        if samples is not None:
            written = samples(state.model, state.precision)  # on every process, since their weights may be sharded
            self._collectives.after_evaluation()
            state.ranks.on_first(lambda: write_samples(self._io.run_dir.samples, step, written))
            for sample in written[:1]:
                self._io.reporter.message(f"step {step}  sample {(sample['prompt'] + sample['text'])[:SHOWN]!r}")
        return {}

    def _validate(self) -> MetricValues:
        state = self._state
        if self._io.validation is None:
            return {}
        validate = partial(self._io.validation, state.model, self._objective, state.precision, self._collectives)
        return validate() | (state.ema.evaluate(validate) if state.ema else {})

    def _probe(self) -> MetricValues:
        scores = self._io.probes(self._state.model, self._state.precision)
        self._collectives.after_evaluation()
        return scores

    def _log(self, metrics: MetricValues) -> None:
        if not metrics:
            return
        for logger in (self._io.metrics_file, *self._io.loggers, self._io.reporter):
            logger.log(self._state.progress.step, metrics)

    def _save(self) -> None:
        info = self._state.ranks.from_first(self._io.metrics_file.checkpoint_info)
        self._checkpoints.save(self._state.snapshot(info))
        self._saved_step = self._state.progress.step

    def _roll_back(self) -> None:
        """Restore the last healthy checkpoint and skip the rows of the bad steps from now on."""
        state, guard = self._state, self._state.spike_guard
        step, (rollbacks, skipped_rows) = state.progress.step, guard.after_rollback()
        if guard.out_of_rollbacks:
            error = TrainingFailed(
                f"{self._train.spike_guard.patience} steps in a row up to step {step} were skipped, after {guard.rollbacks} rollbacks: "
                f"lower train.optim.lr or look at the data; the last healthy checkpoint is in {self._io.run_dir.checkpoints}."
            )
            error.told = not self._collectives.is_main
            raise error
        self._checkpoints.wait()
        snapshot = checkpoint.read(state.ranks.from_first(self._last_healthy), like=model_tensors(state.model))
        state.restore(snapshot)
        self._saved_step = snapshot.step
        guard.rollbacks, guard.skipped_rows = rollbacks, skipped_rows
        self._io.metrics_file.truncate(snapshot.metadata["metrics_bytes"])
        self._log({"event": f"rolled back from step {step}", "rows_skipped": skipped_rows})

    def _last_healthy(self) -> Path:
        """The newest healthy checkpoint, newer ones set aside. Raises TrainingFailed where there is none."""
        checkpoints = self._io.run_dir.checkpoints
        for path in checkpoint.iter_intact(checkpoints, self._io.reporter.message):
            if checkpoint.read_metadata(path)["healthy"]:
                checkpoint.set_aside_newer(path)  # or a later start would resume from them
                return path
        raise TrainingFailed(
            f"The run must roll back from step {self._state.progress.step}, and no healthy checkpoint is left in {checkpoints}."
        )


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    steps: int
    signal: int | None
    """The signal that stopped it before the last step."""


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    init_from: str | Path | None = None,
    keep_optimizer: bool = False,
    reporter: Reporter | None = None,
    allow_code: bool = False,
) -> TrainResult:
    """Train `config` in the run folder `out`, or resume the run that is there.

    init_from: RUN or RUN@STEP, another run whose weights the new one begins with. keep_optimizer: begin with its optimizer's state
    too. allow_code: import the classes of a user's own that the configuration names. Raises an AndromedaError, one sentence, for
    anything that cannot work; a new folder is created only after all checks have passed.
    """
    reporter = reporter or NullReporter()
    with consent(allow_code):
        if keep_optimizer and init_from is None:
            raise ConfigError("--keep-optimizer keeps the state of the run that --init-from names: give that too.")
        if resume and init_from is not None:
            raise ConfigError("A run that is resumed has its own weights: leave out --init-from, or leave out --resume to start a new run.")
        run_dir = RunDir(out)
        parent = None if init_from is None else find_parent(init_from, run_dir, keep_optimizer, reporter.message)
        return _train(config, run_dir, resume, parent, reporter)


def _train(config: RunConfig, run_dir: RunDir, resume: bool, parent: ParentCheckpoint | None, reporter: Reporter) -> TrainResult:
    signals = SignalHandler()
    check_code_allowed(config)
    mesh = join_mesh(config, resolve_device(config.train.device))
    reporter = StoppingReporter(reporter, signals) if mesh is None or mesh.is_main else NullReporter()
    with watched(mesh):
        state = _run(config, run_dir, resume, parent, reporter, signals, mesh)
    if signals.received:
        name = SignalHandler.signal_name(signals.received)
        reporter.message(f"stopped by {name} after step {state.progress.step}, which is saved: resume with --resume --out {run_dir.path}")
    return TrainResult(run_dir.path, state.progress.step, config.train.steps, signals.received)


def _run(
    config: RunConfig,
    run_dir: RunDir,
    resume: bool,
    parent: ParentCheckpoint | None,
    reporter: Reporter,
    signals: SignalHandler,
    mesh: ParallelMesh | None,
) -> TrainState:
    """The run as one process of `mesh`; returns the state at its end."""
    ranks, is_main = (Ranks(mesh.host_group), mesh.is_main) if mesh else (ONE_RANK, True)
    ranks.on_first(lambda: _check_folder(config, run_dir, resume))
    stream, validation, parent = ranks.on_all(partial(_open_data, config, parent))
    if mesh:
        reporter.message(preflight(mesh, config, stream.fingerprint))
    state, probes, samples = ranks.on_all(lambda: _build(config, mesh, stream))
    ranks.on_first(run_dir.claim)
    try:
        with signals.installed(), join_workers(state):
            start = _begin(config, run_dir, state, resume, parent, reporter)
            if next(state.model.parameters()).is_cuda and (unfused := describe_unfused(unfused_parts(state.model))):
                reporter.message(unfused)
            metrics_file, loggers = ranks.on_all(lambda: _open_outputs(config, run_dir, state, start, stream, reporter, is_main))
            throughput = ThroughputMonitor(config.model, resolve_seq_len(config), state.precision, state.collectives.layout.world_size)
            for line in start_summary(config, state.model, state.precision, stream, run_dir.path):
                reporter.message(line)
            io = RunIO(run_dir, stream, validation, probes, samples, metrics_file, loggers, reporter, signals, throughput)
            try:
                Trainer(config, state, io).run()
            finally:
                for logger in (metrics_file, *loggers):
                    logger.close()
    finally:
        run_dir.unlock()
    return state


def _check_folder(config: RunConfig, run_dir: RunDir, resume: bool) -> None:
    changed_keys(run_dir, config, resume)
    check_loggers_installed(config)


def _open_data(config: RunConfig, parent: ParentCheckpoint | None) -> tuple[TokenStream, Validation | None, ParentCheckpoint | None]:
    stream, validation = open_streams(config)
    return stream, validation, parent and fitted(parent, config, stream.tokenizer)


def _build(config: RunConfig, mesh: ParallelMesh | None, stream: TokenStream) -> tuple[TrainState, Probes, Samples | None]:
    samples = build_samples(config, stream.tokenizer)
    state = build_train_state(config, mesh.device if mesh else resolve_device(config.train.device), stream.fingerprint, mesh)
    return state, build_probes(config, stream), samples


def _open_outputs(
    config: RunConfig, run_dir: RunDir, state: TrainState, start: RunStart, stream: TokenStream, reporter: Reporter, is_main: bool
) -> tuple[MetricsFile, list[MetricsLogger]]:
    """Record the start in the run folder and open what metrics are written to; of several processes the main one does."""
    if not is_main:
        return NullMetricsFile(), []
    metrics_file = MetricsFile(run_dir.metrics_file)  # before the start is recorded: opening it may fail
    identity = _record_start(config, run_dir, state, start)
    if stream.tokenizer:
        # So that the run generates text without its corpus.
        stream.tokenizer.save(run_dir.path / "tokenizer")
    loggers = build_loggers(config, run_dir, state.progress.step, identity)
    metrics_file.truncate(start.metrics_bytes)
    if start.metrics_lost:
        reporter.message(start.metrics_lost)
        metrics_file.log(state.progress.step, {"event": f"{METRICS_LOST}: {start.metrics_lost}"})
    return metrics_file, loggers


@dataclass(frozen=True)
class RunStart:
    """What one start of a run begins with."""

    changes: list[str]
    """Keys that differ from the start before."""
    parent: dict[str, Any] | None = None
    """The run that a new run's weights come from, as its manifest names it."""
    schedule: str = ""
    """What becomes of the schedule of a resumed run whose length changes."""
    metrics_bytes: int = 0
    """How much of metrics.jsonl is kept."""
    metrics_lost: str = ""
    """What is wrong with metrics.jsonl."""


def _begin(
    config: RunConfig, run_dir: RunDir, state: TrainState, resume: bool, parent: ParentCheckpoint | None, reporter: Reporter
) -> RunStart:
    """Bring `state` to where the run begins: the newest checkpoint, another run's weights, or as it is."""
    # Again, now that no other process can start a run here.
    changes = state.ranks.from_first(lambda: changed_keys(run_dir, config, resume))
    if parent:
        start_from(parent, state, run_dir)
        reporter.message(f"starting from the weights of {parent.run} at step {parent.step}")
        if parent.added:
            reporter.message(f"{len(parent.added)} special tokens are new: their weights begin as the mean of those of all other tokens")
        return RunStart(changes, parent.record())
    snapshot = resume_latest(state, run_dir, reporter)
    if snapshot is None:
        return RunStart(changes)
    schedule = rest_of_schedule(run_dir.config().train, config.train, snapshot.step) if set(changes) & set(LENGTH) else ""
    if schedule:
        reporter.message(schedule)
    lost = state.ranks.from_first(lambda: set_aside_changed_metrics(run_dir, snapshot.metadata))
    return RunStart(changes, None, schedule, 0 if lost else snapshot.metadata.get("metrics_bytes", 0), lost)


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
    check_head_targets(config.model, stream.targets)
    return stream, build_validation(config) if config.train.eval_every else None


def build_validation(config: RunConfig) -> Validation:
    """The validation that a run of this configuration uses."""
    train, seq_len = config.train, resolve_seq_len(config)
    # Without workers: they prefetch consecutive rows, and validation reads rows that are far apart.
    held_out = open_stream(config.data.model_copy(update={"workers": 0}), seq_len, config.seed, "val")
    return Validation(held_out, train.eval_tokens, seq_len, train.micro_batch_size or train.batch_size, config.data.document_mask)


def _record_start(config: RunConfig, run_dir: RunDir, state: TrainState, start: RunStart) -> str:
    """Write the configuration and this start into the run folder; returns the run's identity."""
    # A manifest without a run was left by a start that was killed before the run began.
    manifest: dict[str, Any] = (run_dir.manifest() if run_dir.exists else {}) or {
        "identity": uuid.uuid4().hex[:12],
        "seed": config.seed,
        "data": state.data_fingerprint,
        "starts": [],
    }
    if start.parent:
        manifest["parent"] = start.parent
    entry = start_entry(state.progress.step, state.precision.device, start.changes, state.collectives.layout)
    manifest["starts"].append(entry | ({"schedule": start.schedule} if start.schedule else {}))
    # The configuration last: it makes the folder a run, which then has its manifest.
    run_dir.write_manifest(manifest)
    run_dir.write_config(config)
    return str(manifest["identity"])
