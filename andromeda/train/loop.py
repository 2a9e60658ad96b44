"""The training loop: data, step, figures, checkpoints, and what happens when something goes wrong."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from andromeda.config.run import RunConfig
from andromeda.data.loader import Stream
from andromeda.errors import AndromedaError
from andromeda.optim import build_schedule
from andromeda.train import checkpoint
from andromeda.train.folder import RunFolder
from andromeda.train.health import Health
from andromeda.train.metrics import MetricsFile, Sink
from andromeda.train.objective import NextToken
from andromeda.train.probes import Probes
from andromeda.train.rows import Rows
from andromeda.train.screen import Screen
from andromeda.train.session import Session
from andromeda.train.signals import Signals
from andromeda.train.speed import Speed
from andromeda.train.step import Stepper, Work
from andromeda.train.validation import NoValidation
from andromeda.train.window import build_window


class TrainingFailed(AndromedaError):
    """A run that cannot go on by itself. Its last healthy checkpoint is on disk."""

    exit_code = 1


@dataclass
class Surroundings:
    """What the loop reads from and writes to."""

    folder: RunFolder
    stream: Stream
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
        session, cursor, size = self._session, self._session.cursor, self._train.batch
        first = session.guard.next_row(cursor.rows)
        with self._around.speed.running(cursor):
            batch = self._around.stream.rows(first, size)
        work = Work(Rows.of(batch, self._config.data.document_mask), batch.tokens, (first, first + size), self._window(cursor.step))
        session.optimizer.set_factor(self._factor(cursor.step), cursor.step)
        watched = self._due(self._train.log.health, cursor.step + 1)
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
        if self._due(train.log.health, step):
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
                f"{self._train.guard.patience} steps in a row up to step {step} could not be taken, "
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
