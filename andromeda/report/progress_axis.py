"""What the curves of a training are drawn over: steps, tokens or time. All are in the page; a choice at its top shows one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from andromeda.train.metrics import MetricsHistory
from andromeda.utils.formatting import format_si
from andromeda.utils.html import Axis, Markup, el

Points = list[tuple[float, float]]

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
"""Of time, with their seconds."""


@dataclass(frozen=True)
class ProgressAxis:
    """One way to measure how far a training is. steps, values: increasing steps, and what each has reached."""

    name: str
    label: str
    steps: Sequence[float] = ()
    values: Sequence[float] = ()

    def at(self, step: float) -> float:
        """The place of a step on this axis, between the nearest ones that are known."""
        return float(np.interp(step, self.steps, self.values)) if self.steps else step

    def points(self, series: Points) -> Points:
        """(step, value) as (place, value)."""
        return [(self.at(step), value) for step, value in series]

    @property
    def axis(self) -> Axis:
        """The axis of a chart."""
        return Axis(self.label, show=format_si)


def progress_axes(metrics: MetricsHistory) -> list[ProgressAxis]:
    """Steps, and tokens and time where they were logged."""
    tokens, seconds = (dict(metrics.series(name)) for name in ("tokens", "seconds"))
    unit, name = next(((unit, name) for unit, name in UNITS if max(seconds.values(), default=0.0) >= 2 * unit), UNITS[-1])
    axes = [ProgressAxis("step", "step")]
    if tokens:
        axes.append(ProgressAxis("tokens", "tokens", sorted(tokens), [tokens[step] for step in sorted(tokens)]))
    if seconds:
        axes.append(ProgressAxis("time", f"{name} in steps", sorted(seconds), [seconds[step] / unit for step in sorted(seconds)]))
    return axes


def drawn_over(axes: Sequence[ProgressAxis], draw: Callable[[ProgressAxis], Markup]) -> Markup:
    """A figure over each of the axes, of which the style sheet shows the one that is chosen."""
    return el("div", [el("div", draw(axis), class_=f"over over-{axis.name}") for axis in axes], class_="overs")


def axis_choice(axes: Sequence[ProgressAxis]) -> Markup | None:
    """The choice of an axis, for all curves of the page; nothing where there is only one."""
    if len(axes) < 2:
        return None
    chosen = axes[0]
    inputs = [el("input", type="radio", name="over", id=f"over-{axis.name}", checked=axis is chosen) for axis in axes]
    options = [el("label", button, f" {axis.name}") for button, axis in zip(inputs, axes, strict=True)]
    return el("fieldset", el("legend", "Curves over"), options, class_="choice")
