"""Reasoning probes through training, beside the score of guessing."""

from __future__ import annotations

from andromeda.report.parts import empty, quoted
from andromeda.report.record import Record
from andromeda.utils.formatting import percent
from andromeda.utils.html import Axis, Rule, Section, Series, details, grid, join, lines, table

WHAT = {
    "arithmetic": "the sum of two digits, after four examples",
    "recall": "the value of a key, among eight pairs of tokens",
    "induction": "the token that came next the first time",
    "multihop": "a digit, by way of two assignments",
}


def probes(record: Record) -> Section:
    """The section."""
    lead = "Small generated tasks, the same problems at every measurement; solved means that greedy decoding writes exactly the answer."
    metrics = record.metrics
    names = [name for name in metrics.names("probe/") if not name.endswith("/chance") and metrics.points(name)]
    if not names:
        resume = f"andromeda train --out {quoted(record.path)} --resume train.probes.every=100"
        return Section("probes", "Probes", lead, empty("No probes were scored. To score them while training (or going on):", resume))
    drawn = []
    for i, name in enumerate(names):
        task, chance = name.partition("/")[2], metrics.last(name + "/chance")
        rules = [Rule("guessing", chance)] if chance is not None else []
        # Half of the chart at least, so that small differences near guessing look small.
        top = max([0.5, *(value for _, value in metrics.points(name))])
        axis = Axis("", show=percent, ends=(0.0, 1.0 if top > 0.5 else 0.5))
        series = [Series("solved", metrics.points(name), i % 6 + 1, dots=True)]
        drawn.append(lines(task.capitalize(), series, Axis("step"), axis, rules=rules, note=WHAT.get(task, ""), narrow=True))
    steps = sorted({step for name in names for step, _ in metrics.points(name)})
    values = {name: dict(metrics.points(name)) for name in names}
    rows = [[f"{step:,.0f}", *(percent(values[name].get(step)) for name in names)] for step in steps[-12:]]
    chances = [["guessing", *(percent(metrics.last(name + "/chance")) for name in names)]]
    body = table(["step", *(name.partition("/")[2] for name in names)], rows + chances)
    return Section("probes", "Probes", lead, join(grid(*drawn, kind="four"), details("The probes as a table", body)))
