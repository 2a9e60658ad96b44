"""How far a run is, and how that is shown: a live bar on a terminal, plain lines when piped, JSON lines on request."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from andromeda.train.signals import SignalHandler
from andromeda.utils.untrusted import printable

MetricValues = dict[str, Any]
"""Metrics of a step by name; text and lists may be among them."""


@dataclass
class Progress:
    """How far a run is, in units that do not depend on the number of processes."""

    step: int = 0
    """Steps done, skipped ones included."""
    rows: int = 0
    """Rows of the stream read, skipped ones included."""
    tokens: int = 0
    """Targets learned from."""
    seconds: float = 0.0
    """Time spent training, over all starts."""


class Reporter(Protocol):
    """Shows metrics and messages to the user."""

    def log(self, step: int, metrics: MetricValues) -> None:
        """Show the metrics of a step."""

    def message(self, text: str) -> None:
        """Show a message."""

    def step_done(self, step: int) -> None:
        """Show that a step is done; its metrics may come later."""

    def close(self) -> None:
        """Release the terminal."""


class NullReporter:
    """Shows nothing."""

    def log(self, step: int, metrics: MetricValues) -> None: ...
    def message(self, text: str) -> None: ...
    def step_done(self, step: int) -> None: ...
    def close(self) -> None: ...


class StoppingReporter:
    """Passes everything on; where nobody reads the output any more (`| head`), the run stops after its step, as by a signal."""

    def __init__(self, inner: Reporter, signals: SignalHandler) -> None:
        self._inner, self._signals = inner, signals

    def log(self, step: int, metrics: MetricValues) -> None:
        self._show(lambda: self._inner.log(step, metrics))

    def message(self, text: str) -> None:
        self._show(lambda: self._inner.message(text))

    def step_done(self, step: int) -> None:
        self._show(lambda: self._inner.step_done(step))

    def close(self) -> None:
        self._inner.close()

    def _show(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BrokenPipeError:
            self._inner = NullReporter()
            self._signals.received = self._signals.received or signal.SIGPIPE


class TimeLeft:
    """The time until the last step, by the mean time of the steps after the first, which may compile."""

    def __init__(self, steps: int) -> None:
        self._steps, self._marks = steps, [(0, time.monotonic())]

    def step_done(self, step: int) -> None:
        """Note the time of a step."""
        if len(self._marks) == 1:  # a resumed run begins with the step before it
            self._marks = [(step - 1, self._marks[0][1])]
        self._marks = [*self._marks[:2], (step, time.monotonic())]

    def text(self) -> str:
        """Such as `0:01:30`; empty before the first step, and after the last one."""
        (first, start), (last, end) = self._marks[min(1, len(self._marks) - 2)] if len(self._marks) > 2 else self._marks[0], self._marks[-1]
        if last <= first or last >= self._steps:
            return ""
        return str(timedelta(seconds=round((end - start) / (last - first) * (self._steps - last))))


class JsonLinesReporter(NullReporter):
    """Metrics on stdout, one JSON object a line as in metrics.jsonl; messages on stderr."""

    def log(self, step: int, metrics: MetricValues) -> None:
        print(json.dumps({"step": step} | metrics), flush=True)

    def message(self, text: str) -> None:
        print(f"andromeda: {printable(text)}", file=sys.stderr, flush=True)


class PlainTextReporter(NullReporter):
    """One line of text for each set of metrics."""

    def __init__(self, steps: int) -> None:
        self._steps, self._left = steps, TimeLeft(steps)

    def step_done(self, step: int) -> None:
        self._left.step_done(step)

    def log(self, step: int, metrics: MetricValues) -> None:
        left = self._left.text() if "loss" in metrics else ""
        if text := format_metrics(metrics):
            print(f"step {step}/{self._steps}  {text}{f'  {left} left' if left else ''}", flush=True)

    def message(self, text: str) -> None:
        print(printable(text), flush=True)


class ConsoleReporter(NullReporter):
    """A progress bar with the newest metrics below it; validation, probes and messages are printed above."""

    def __init__(self, steps: int, console: Console) -> None:
        self._bar = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[left]}"),
        )
        self._task, self._left = self._bar.add_task("train", total=steps, left=""), TimeLeft(steps)
        self._latest = Text()
        self._live = Live(Group(self._bar, self._latest), console=console, refresh_per_second=4)
        self._steps = steps

    def step_done(self, step: int) -> None:
        self._live.start()
        self._left.step_done(step)
        left = self._left.text()
        self._bar.update(self._task, completed=step, left=f"{left} left" if left else "")

    def log(self, step: int, metrics: MetricValues) -> None:
        self._live.start()
        if "loss" in metrics:
            self._latest.plain = format_metrics(metrics)
        elif text := format_metrics(metrics):
            self.message(f"step {step}/{self._steps}  {text}")

    def message(self, text: str) -> None:
        self._live.console.print(printable(text), highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar and leave it on the screen."""
        self._live.stop()


def build_reporter(steps: int, as_json: bool = False) -> Reporter:
    """The reporter that suits stdout: a bar on a terminal, lines of text in a pipe, JSON on request."""
    if as_json:
        return JsonLinesReporter()
    console = Console()
    return ConsoleReporter(steps, console) if console.is_terminal else PlainTextReporter(steps)


FORMATS = {
    "loss": ("loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "validation/loss": ("validation loss", "{:.4f}"),
    "validation/bits_per_byte": ("bits/byte", "{:.4f}"),
    "validation/loss_average": ("with averaged weights", "{:.4f}"),
    "gradient_norm": ("norm", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "tokens_per_second_per_device": ("tokens/s a device", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "memory_gib": ("GiB", "{:.2f}"),
    "update_ratio/matrix": ("update/weight of matrices", "{:.2g}"),
    "activation_max": ("largest activation", "{:.3g}"),
    "attention_logit_bound": ("attention logit", "{:.3g}"),
}
"""Label and number format of the metrics that are shown; all others are in metrics.jsonl only."""


def format_metrics(metrics: MetricValues) -> str:
    """Metrics as one line of text."""
    shown = [f"{label} {form.format(metrics[name])}" for name, (label, form) in FORMATS.items() if metrics.get(name) is not None]
    shown += [
        f"{name[6:]} {value:.0%} (chance {metrics[name + '/chance']:.0%})" for name, value in metrics.items() if name + "/chance" in metrics
    ]
    shown += [str(metrics["event"])] if "event" in metrics else []
    return "  ".join(shown)
