"""What a person sees while a run goes on: a live line on a terminal, plain lines when piped, JSON lines when asked for."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Figures = dict[str, Any]


class Screen(Protocol):
    """Shows figures and remarks."""

    def write(self, step: int, figures: Figures) -> None:
        """Figures of a step."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """Finish."""


class Silent:
    """Shows nothing."""

    def write(self, step: int, figures: Figures) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class JsonLines(Silent):
    """Each line of metrics.jsonl on stdout as it is written; remarks on stderr."""

    def write(self, step: int, figures: Figures) -> None:
        """One object."""
        print(json.dumps({"step": step} | figures), flush=True)

    def note(self, text: str) -> None:
        """On stderr."""
        print(f"andromeda: {text}", file=sys.stderr, flush=True)


class Lines(Silent):
    """A line for each set of figures."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def write(self, step: int, figures: Figures) -> None:
        """One line."""
        if shown := describe(figures):
            print(f"step {step}/{self._steps}  {shown}", flush=True)

    def note(self, text: str) -> None:
        """One line."""
        print(text, flush=True)


class Terminal(Silent):
    """A bar with the newest figures below it; what stays above are validation, probes and remarks."""

    def __init__(self, steps: int, console: Console) -> None:
        self._progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
        self._task = self._progress.add_task("train", total=steps)
        self._figures = Text()
        self._live = Live(Group(self._progress, self._figures), console=console, refresh_per_second=4)
        self._steps = steps

    def write(self, step: int, figures: Figures) -> None:
        """Into the bar, or above it."""
        self._live.start()
        if "loss" in figures:
            self._progress.update(self._task, completed=step)
            self._figures.plain = describe(figures)
        elif shown := describe(figures):
            self.note(f"step {step}/{self._steps}  {shown}")

    def note(self, text: str) -> None:
        """Above the bar."""
        self._live.console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._live.stop()


def build_screen(steps: int, as_json: bool = False) -> Screen:
    """The screen that suits where stdout goes."""
    if as_json:
        return JsonLines()
    console = Console()
    return Terminal(steps, console) if console.is_terminal else Lines(steps)


FORMATS = {
    "loss": ("loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "validation/loss": ("validation loss", "{:.4f}"),
    "validation/bits_per_byte": ("bits/byte", "{:.4f}"),
    "validation/loss_average": ("of the average", "{:.4f}"),
    "gradient_norm": ("norm", "{:.3g}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "memory_gib": ("GiB", "{:.2f}"),
    "update_ratio/matrix": ("update/weight of matrices", "{:.2g}"),
    "activation_max": ("largest activation", "{:.3g}"),
    "attention_logit_bound": ("attention logit", "{:.3g}"),
}
"""How figures are shown; those not here stay in metrics.jsonl."""


def describe(figures: Figures) -> str:
    """Figures on one line."""
    shown = [f"{label} {form.format(figures[name])}" for name, (label, form) in FORMATS.items() if figures.get(name) is not None]
    shown += [
        f"{name[6:]} {figure:.0%} (chance {figures[name + '/chance']:.0%})"
        for name, figure in figures.items()
        if name + "/chance" in figures
    ]
    shown += [str(figures["event"])] if "event" in figures else []
    return "  ".join(shown)
