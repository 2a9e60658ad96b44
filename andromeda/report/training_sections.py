"""Sections about training: curves, probes and samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby

from andromeda.report.fragments import code, missing_section, shell_quote
from andromeda.report.progress_axis import ProgressAxis, axis_choice, drawn_over, progress_axes
from andromeda.report.run_data import GeneratedSample, RunData
from andromeda.train.metrics import MetricsHistory
from andromeda.utils.formatting import format_number, format_percent, format_si
from andromeda.utils.html import Axis, Markup, ReferenceLine, Section, Series, details, el, grid, join, line_chart, table

MOST_EVENTS = 200
"""The newest ones are drawn and listed."""


def curves_section(record: RunData) -> Section:
    """The section."""
    metrics = record.metrics
    lead = "Means over the steps since the previous log line; hover for values."
    if not metrics.series("loss"):
        commands = [] if record.finished else [f"andromeda train --out {shell_quote(record.path)} --resume"]
        nothing = missing_section("The run has no metrics of its training." if record.finished else "Nothing is logged yet.", *commands)
        return Section("curves", "Curves", lead, nothing)
    axes = progress_axes(metrics)
    notes = (
        [f"{metrics.num_unreadable} line{'s' * (metrics.num_unreadable > 1)} of metrics.jsonl cannot be read and is left out."]
        if metrics.num_unreadable
        else []
    )
    return Section(
        "curves",
        "Curves",
        lead,
        join(
            axis_choice(axes),
            drawn_over(axes, lambda over: _loss(metrics, over)),
            grid(*(drawn_over(axes, draw) for draw in _others(record))),
            _health(record, axes),
            _events(metrics),
            [el("p", n, class_="note") for n in notes],
            _table(metrics),
        ),
    )


def _loss(metrics: MetricsHistory, over: ProgressAxis) -> Markup:
    series = [
        Series("training", over.points(metrics.series("loss"))),
        Series("validation", over.points(metrics.series("validation/loss")), 2, dots=True),
        Series("validation of the moving average", over.points(metrics.series("validation/loss_average")), 3, dots=True),
    ]
    bad = [over.at(line["step"]) for line in metrics.records if "event" in line]
    return line_chart("Loss", series, over.axis, Axis("nats per token"), marks=bad[-MOST_EVENTS:], wide=True)


def _others(record: RunData) -> list[Callable[[ProgressAxis], Markup]]:
    """The smaller charts, each drawn over any axis."""
    metrics = record.metrics
    drawn: list[Callable[[ProgressAxis], Markup]] = []
    if metrics.series("bits_per_byte"):
        drawn.append(partial(_bits_per_byte, record))
    drawn += [partial(_head, metrics, name) for name in metrics.names("loss/")]
    if weights := metrics.names("weight/"):
        drawn.append(partial(_task_weights, metrics, weights))
    if rates := metrics.names("lr/"):
        drawn.append(partial(_rates, metrics, rates))
    drawn.append(partial(_one, metrics, "gradient_norm", "Gradient norm", Axis("before clipping", log=True)))
    drawn.append(partial(_one, metrics, "tokens_per_second", "Speed", Axis("tokens/s", zero=True)))
    if metrics.series("mfu"):
        drawn.append(partial(_one, metrics, "mfu", "MFU", Axis("model FLOPs over the device's peak", zero=True, show=format_percent)))
    if metrics.series("memory_gib"):
        drawn.append(partial(_one, metrics, "memory_gib", "Memory", Axis("most so far, GiB", zero=True)))
    return drawn


def _head(metrics: MetricsHistory, name: str, over: ProgressAxis) -> Markup:
    """Loss of one head."""
    series = [
        Series("training", over.points(metrics.series(name))),
        Series("validation", over.points(metrics.series(f"validation/{name}")), 2, dots=True),
    ]
    return line_chart(f"Loss of {name.removeprefix('loss/')}", series, over.axis, Axis("nats per target"))


def _task_weights(metrics: MetricsHistory, names: list[str], over: ProgressAxis) -> Markup:
    """Weights of the tasks in the sum of all losses."""
    series = [Series(name.removeprefix("weight/"), over.points(metrics.series(name)), i % 8 + 1) for i, name in enumerate(names)]
    return line_chart("Task weights", series, over.axis, Axis("in the sum of all losses"))


def _bits_per_byte(record: RunData, over: ProgressAxis) -> Markup:
    series = [
        Series("training", over.points(record.metrics.series("bits_per_byte"))),
        Series("validation", over.points(record.metrics.series("validation/bits_per_byte")), 2, dots=True),
    ]
    rules = [ReferenceLine({"xz": "xz -9", "zlib": "zlib -9"}[name], value) for name, value in record.compressors.items()]
    return line_chart("Bits per byte", series, over.axis, Axis("of UTF-8 text"), rules=rules)


def _rates(metrics: MetricsHistory, names: list[str], over: ProgressAxis) -> Markup:
    peaks = {name: max(value for _, value in metrics.series(name)) for name in names if metrics.series(name)}
    note = "Peaks: " + ", ".join(f"{name[3:]} {format_number(peak, 3)}" for name, peak in peaks.items()) + "."
    first = next(iter(peaks), names[0])
    points = [(step, value / (peaks.get(first) or 1)) for step, value in metrics.series(first)]
    shares = Axis("share of its peak", zero=True, show=format_percent)
    return line_chart("Learning rate", [Series("share of its peak", over.points(points))], over.axis, shares, note=note)


def _one(metrics: MetricsHistory, name: str, title: str, values: Axis, over: ProgressAxis) -> Markup:
    return line_chart(title, [Series(title.lower(), over.points(metrics.series(name)))], over.axis, values)


def _health(record: RunData, axes: list[ProgressAxis]) -> Markup:
    metrics = record.metrics
    ratios = metrics.names("update_ratio/")
    if not ratios:
        text = "Health of updates, activations and attention logits was not measured; to measure it while training, set"
        return el("p", text, " ", code("train.log.diagnostics_every=100"), ".", class_="note")
    drawn: list[Callable[[ProgressAxis], Markup]] = [
        partial(_update_ratios, metrics, ratios),
        partial(_one, metrics, "activation_max", "Largest activation", Axis("after any block", log=True)),
        partial(_one, metrics, "attention_logit_bound", "Largest attention logit", Axis("bound by norms of queries and keys", zero=True)),
    ]
    return join(el("h3", "Health"), grid(*(drawn_over(axes, draw) for draw in drawn)))


def _update_ratios(metrics: MetricsHistory, names: list[str], over: ProgressAxis) -> Markup:
    series = [Series(name.partition("/")[2], over.points(metrics.series(name)), i % 6 + 1, dots=True) for i, name in enumerate(names)]
    return line_chart("Update over weight", series, over.axis, Axis("one step, by role", log=True))


def _events(metrics: MetricsHistory) -> Markup | None:
    events = [(format_si(line["step"]), str(line["event"])) for line in metrics.records if "event" in line]
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


def _table(metrics: MetricsHistory, rows: int = 16) -> Markup:
    """The curves in figures, at evenly spaced steps."""
    steps = [int(step) for step, _ in metrics.series("loss")]
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(1, rows - 1))] for i in range(rows)})
    shown = {name: label for name, label in COLUMNS.items() if metrics.series(name)}
    values = {name: dict(metrics.series(name)) for name in shown}
    body = [[f"{step:,}", *(_cell(values[name].get(step)) for name in shown)] for step in chosen]
    return details("The curves as a table", table(["step", *shown.values()], body))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else format_number(value)


PROBE_DESCRIPTIONS = {
    "arithmetic": "the sum of two digits, after four examples",
    "recall": "the value of a key, among eight pairs of tokens",
    "induction": "the token that came next the first time",
    "multihop": "a digit, by way of two assignments",
}


def probes_section(record: RunData) -> Section:
    """The section."""
    lead = "Small generated tasks, the same problems at every measurement; solved means that greedy decoding gives exactly the answer."
    metrics = record.metrics
    names = [name for name in metrics.names("probe/") if not name.endswith("/chance") and metrics.series(name)]
    if not names:
        return Section("probes", "Probes", lead, _no_probes(record))
    axes = progress_axes(metrics)
    drawn = [drawn_over(axes, partial(_probe, metrics, name, i % 6 + 1)) for i, name in enumerate(names)]
    steps = sorted({step for name in names for step, _ in metrics.series(name)})
    values = {name: dict(metrics.series(name)) for name in names}
    rows = [[f"{step:,.0f}", *(format_percent(values[name].get(step)) for name in names)] for step in steps[-12:]]
    chances = [["guessing", *(format_percent(metrics.latest(name + "/chance")) for name in names)]]
    body = table(["step", *(name.partition("/")[2] for name in names)], rows + chances)
    return Section("probes", "Probes", lead, join(grid(*drawn, kind="four"), details("The probes as a table", body)))


def _no_probes(record: RunData) -> Markup:
    """What scores the tasks of the probes: of a run in progress while it trains, of a finished one afterwards."""
    path = shell_quote(record.path)
    if record.finished:
        why = "No probes were scored while training. To score such tasks on the trained weights:"
        return missing_section(why, f"andromeda eval {path} reasoning")
    resume = f"andromeda train --out {path} --resume train.probes.every=100"
    return missing_section("No probes were scored. To score them while training, or when resuming:", resume)


def _probe(metrics: MetricsHistory, name: str, color: int, over: ProgressAxis) -> Markup:
    task, chance = name.partition("/")[2], metrics.latest(name + "/chance")
    rules = [ReferenceLine("guessing", chance)] if chance is not None else []
    # Half of the chart at least, so that small differences near guessing look small.
    top = max([0.5, *(value for _, value in metrics.series(name))])
    solved = Axis("", show=format_percent, ends=(0.0, 1.0 if top > 0.5 else 0.5))
    series = [Series("solved", over.points(metrics.series(name)), color, dots=True)]
    return line_chart(task.capitalize(), series, over.axis, solved, rules=rules, note=PROBE_DESCRIPTIONS.get(task, ""), narrow=True)


def samples_section(record: RunData) -> Section:
    """The section."""
    lead = "Unselected; prompts are in color."
    if not record.samples:
        fill = f'andromeda generate {shell_quote(record.path)} "Once" --json > {shell_quote(record.path / "samples" / "mine.jsonl")}'
        return Section("samples", "Samples", lead, missing_section("No samples are kept. To add some:", fill))
    parts: list[Markup] = []
    for file, group in groupby(record.samples, key=lambda s: s.file):
        parts += [el("h3", el("code", f"samples/{file}")), *_of_file(list(group))]
    return Section("samples", "Samples", lead, parts)


def _of_file(samples: list[GeneratedSample]) -> list[Markup]:
    """Samples of one file; of those that were written during training, the newest are open."""
    steps = sorted({s.step for s in samples if s.step is not None}, reverse=True)
    shown = [_sample(s) for s in samples if s.step is None or s.step == steps[0]]
    return shown + [details(f"Step {step:,}", *(_sample(s) for s in samples if s.step == step)) for step in steps[1:]]


def _sample(sample: GeneratedSample) -> Markup:
    about = ", ".join(filter(None, ["" if sample.step is None else f"step {sample.step:,}", sample.about]))
    note = el("figcaption", el("span", about, class_="unit")) if about else None
    text = el("pre", el("span", sample.prompt, class_="prompt") if sample.prompt else None, sample.text)
    return el("figure", note, text, class_="sample")
