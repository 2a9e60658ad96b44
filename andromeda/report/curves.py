"""How training went: loss, bits per byte, rates, norms, speed, and the signs of health."""

from __future__ import annotations

from collections.abc import Callable

from andromeda.report.parts import command, empty
from andromeda.report.record import Metrics, Record
from andromeda.utils.formatting import figure, percent, short
from andromeda.utils.html import Axis, Html, Rule, Section, Series, details, el, grid, join, lines, table

STEP = "step"
MOST_EVENTS = 200
"""The newest ones are drawn and listed."""


def curves(record: Record) -> Section:
    """The section."""
    metrics = record.metrics
    lead = "Means over the steps since the line before, as training logged them; the figures under the pointer are told."
    if not metrics.points("loss"):
        nothing = empty("Nothing is logged yet.", f"andromeda train --out {record.path} --resume")
        return Section("curves", "Curves", lead, nothing)
    notes = (
        [f"{metrics.broken} line{'s' * (metrics.broken > 1)} of metrics.jsonl cannot be read and is left out."] if metrics.broken else []
    )
    return Section(
        "curves",
        "Curves",
        lead,
        join(
            _loss(metrics),
            grid(*_others(record)),
            _health(record),
            _events(metrics),
            [el("p", n, class_="note") for n in notes],
            _table(metrics),
        ),
    )


def _loss(metrics: Metrics) -> Html:
    series = [
        Series("training", metrics.points("loss")),
        Series("validation", metrics.points("validation/loss"), 2, dots=True),
        Series("validation of the moving average", metrics.points("validation/loss_average"), 3, dots=True),
    ]
    bad = [float(line["step"]) for line in metrics.lines if "event" in line]
    return lines("Loss", series, Axis(STEP), Axis("nats per token"), marks=bad[-MOST_EVENTS:], wide=True)


def _others(record: Record) -> list[Html]:
    metrics = record.metrics
    bits = [
        Series("training", metrics.points("bits_per_byte")),
        Series("validation", metrics.points("validation/bits_per_byte"), 2, dots=True),
    ]
    rules = [Rule({"xz": "xz -9", "zlib": "zlib -9"}[name], value) for name, value in record.compressors.items()]
    drawn = [lines("Bits per byte", bits, Axis(STEP), Axis("of UTF-8 text"), rules=rules)] if bits[0].points else []
    if rates := metrics.names("lr/"):
        drawn.append(_rates(metrics, rates))
    drawn.append(_one(metrics, "gradient_norm", "Gradient norm", "before clipping", log=True))
    drawn.append(_one(metrics, "tokens_per_second", "Speed", "tokens per second", zero=True))
    if metrics.points("mfu"):
        drawn.append(_one(metrics, "mfu", "MFU", "model FLOPs over the device's peak", zero=True, show=percent))
    if metrics.points("memory_gib"):
        drawn.append(_one(metrics, "memory_gib", "Memory", "most so far, GiB", zero=True))
    return drawn


def _rates(metrics: Metrics, names: list[str]) -> Html:
    peaks = {name: max(value for _, value in metrics.points(name)) for name in names if metrics.points(name)}
    note = "Peaks: " + ", ".join(f"{name[3:]} {figure(peak, 3)}" for name, peak in peaks.items()) + "."
    first = next(iter(peaks), names[0])
    points = [(step, value / (peaks.get(first) or 1)) for step, value in metrics.points(first)]
    return lines(
        "Learning rate", [Series("share of its peak", points)], Axis(STEP), Axis("share of its peak", zero=True, show=percent), note=note
    )


def _one(
    metrics: Metrics, name: str, title: str, unit: str, *, log: bool = False, zero: bool = False, show: Callable[[float], str] = short
) -> Html:
    return lines(title, [Series(title.lower(), metrics.points(name))], Axis(STEP), Axis(unit, log=log, zero=zero, show=show))


def _health(record: Record) -> Html:
    metrics = record.metrics
    ratios = metrics.names("update_ratio/")
    if not ratios:
        text = "Health of updates, activations and attention logits was not measured; to measure it while training, set"
        return el("p", text, " ", command("train.log.diagnostics_every=100"), ".", class_="note")
    series = [Series(name.partition("/")[2], metrics.points(name), i % 6 + 1, dots=True) for i, name in enumerate(ratios)]
    return join(
        el("h3", "Health"),
        grid(
            lines("Update over weight", series, Axis(STEP), Axis("one step, by role", log=True)),
            _one(metrics, "activation_max", "Largest activation", "after any block", log=True),
            _one(metrics, "attention_logit_bound", "Largest attention logit", "bound by norms of queries and keys", zero=True),
        ),
    )


def _events(metrics: Metrics) -> Html | None:
    events = [(short(line["step"]), str(line["event"])) for line in metrics.lines if "event" in line]
    if not events:
        return None
    title = f"{len(events)} event{'s' * (len(events) > 1)} (dotted lines above)"
    return details(title, table(["step", "event"], events[-MOST_EVENTS:], text=2))


COLUMNS = {
    "loss": "loss",
    "bits_per_byte": "bits/byte",
    "validation/loss": "validation loss",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "tokens": "tokens",
    "seconds": "seconds",
}


def _table(metrics: Metrics, rows: int = 16) -> Html:
    """The curves in figures, at evenly spaced steps."""
    steps = [int(step) for step, _ in metrics.points("loss")]
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(1, rows - 1))] for i in range(rows)})
    shown = {name: label for name, label in COLUMNS.items() if metrics.points(name)}
    values = {name: dict(metrics.points(name)) for name in shown}
    body = [[f"{step:,}", *(_cell(values[name].get(step)) for name in shown)] for step in chosen]
    return details("The curves as a table", table(["step", *shown.values()], body))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else figure(value)
