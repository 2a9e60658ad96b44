"""What the model can do, measured after training: every result of the run folder, each with the command that made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from andromeda.evaluate.result import EvalResult
from andromeda.report.fragments import MALFORMED, code, malformed_result, missing_section, provenance_notes, shell_quote
from andromeda.report.run_data import RunData, held_out_bits
from andromeda.train.metrics import is_number
from andromeda.utils.formatting import format_number, format_percent, format_si
from andromeda.utils.html import Axis, Child, Markup, ReferenceLine, Section, Series, details, el, grid, heat_map, join, line_chart, table

COMMANDS = ("bits", "reasoning", "context")
"""Kinds that `andromeda eval` measures quickly on any machine."""


def evaluation_section(record: RunData) -> Section:
    """The section."""
    lead = ["Measured on the trained weights; each result is reproduced by its command and checked by ", code("andromeda verify"), "."]
    found = [result for kind in SHOWN for result in record.of_kind(kind)]
    parts = [part for part in (_compressors(record), *(_one(result) for result in found)) if part]
    notes = [el("p", problem, class_="empty") for problem in record.problems]
    commands = [f"andromeda eval {shell_quote(record.path)} {kind}" for kind in COMMANDS]
    shown = grid(*parts, kind="two") if parts else missing_section("Nothing was evaluated yet. To measure:", *commands)
    return Section("evaluation", "Evaluation", lead, join(notes, shown, provenance_notes(found, record.newest)))


def _one(result: EvalResult) -> Markup:
    try:
        body = SHOWN[result.kind](result)
    except MALFORMED:
        body = malformed_result(result)
    name = el("small", f" {result.name}") if result.name != result.kind else None
    return el("div", el("h3", TITLES[result.kind], name), body, class_="result")


def _compressors(record: RunData) -> Markup | None:
    """What the demo is compared with: the bits that general compressors need for the same bytes."""
    bits = held_out_bits(record)
    if bits is None or not record.compressors:
        return None
    others = [[f"{name} -9", format_number(value)] for name, value in record.compressors.items()]
    rows = [["this model", format_number(bits)], *others]
    return el("div", el("h3", "Compared with compressors"), table(["held-out text", "bits per byte"], rows), class_="result")


def _bits(result: EvalResult) -> Markup:
    r = result.result
    head = ["bits per byte", "nats per token", "tokens", "bytes"]
    return table(head, [[format_number(r["bits_per_byte"]), format_number(r["loss"]), f"{r['tokens']:,}", f"{r['bytes']:,}"]], text=0)


def _reasoning(result: EvalResult) -> Markup:
    rows = [
        [
            task,
            format_percent(r.get("in")),
            format_percent(r.get("chance")),
            format_percent(r.get("out")),
            format_percent(r.get("chance_out")),
        ]
        for task, r in result.result.items()
        if isinstance(r, dict)
    ]
    note = "Usual: as in the probes of training. Harder: larger than any problem there, out of distribution. Exact answers only."
    return join(table(["task", "usual", "guessing", "harder", "guessing"], rows), el("p", note, class_="note"))


def _choices(result: EvalResult) -> Markup:
    r = result.result
    row = [
        format_percent(r["accuracy"]),
        format_percent(r.get("normalized")),
        format_percent(r.get("chance")),
        f"{r['questions']:,}",
        str(r["shots"]),
    ]
    return table(["right", "right, by length", "guessing", "questions", "examples shown"], [row], text=0)


def _gsm8k(result: EvalResult) -> Markup:
    r = result.result
    row = [format_percent(r["exact_match"]), format_percent(r.get("answered")), f"{r['questions']:,}", str(r["shots"])]
    return table(["right", "answered", "questions", "examples shown"], [row], text=0)


def _harness(result: EvalResult) -> Markup:
    rows = [[task, metric, _plain(value)] for task, metrics in result.result.items() for metric, value in metrics.items()]
    return table(["task", "metric", "figure"], rows, text=2)


def _heads(result: EvalResult) -> Markup:
    """A row for each head, a column for each figure that any of them has."""
    columns = list(dict.fromkeys(metric for figures in result.result.values() for metric in figures))
    rows = [
        [head, *(f"{figures[m]:,}" if m == "targets" and m in figures else format_number(figures.get(m)) for m in columns)]
        for head, figures in result.result.items()
    ]
    note = "On held-out documents. Calibration error: mean distance of confidence and accuracy, in 15 bins."
    return join(table(["head", *(metric.replace("_", " ") for metric in columns)], rows), el("p", note, class_="note"))


def _context(result: EvalResult) -> Markup:
    r = result.result
    lengths, nats, errors = r["context"], r["nats"], r.get("error") or [0.0] * len(r["nats"])
    gains = _gains(r)
    chart = _loss_by_context(r, errors) if gains is None else _gain_chart(r, *gains)
    head, rows = ["context", "nats per token", "standard error"], [[f"{n:,}"] for n in lengths]
    for row, value, error in zip(rows, nats, errors, strict=True):
        row += [format_number(value), format_number(error, 2)]
    if gains is not None:
        head += ["gain", "its standard error"]
        for row, value, error in zip(rows, *gains, strict=True):
            row += [format_number(value), format_number(error, 2)]
    return join(grid(chart), details("As a table", table(head, rows)))


def _gains(r: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """What each context gains over the shortest, and the standard error of that difference; None where the result does not tell it.

    It is paired: the targets are the same, and most of what makes them easy or hard is common to all lengths.
    """
    if r.get("gain") and r.get("gain_error"):
        return r["gain"], r["gain_error"]
    windows = r.get("windows")
    if not windows or len(windows[0]) < 2:
        return None
    apart = np.asarray(windows[0], float) - np.asarray(windows, float)
    return apart.mean(1).tolist(), (apart.std(1, ddof=1) / math.sqrt(apart.shape[1])).tolist()


def _gain_chart(r: dict[str, Any], gains: list[float], errors: list[float]) -> Markup:
    lengths = r["context"]
    points = [(float(n), v) for n, v in zip(lengths, gains, strict=True)]
    band = [(float(n), v - 2 * e, v + 2 * e) for n, v, e in zip(lengths, gains, errors, strict=True)]
    last = f"With {lengths[-1]:,} tokens it is {format_number(gains[-1], 3)} nats lower"
    sure = f", {abs(gains[-1]) / errors[-1]:.1f} standard errors" if errors[-1] else ""
    note = (
        f"The loss of the same {r['tokens']:,} targets after a longer context, compared with {lengths[0]:,} tokens. {last}{sure}. The "
        "band is two standard errors of that difference to each side."
    )
    series = [Series("gain", points, dots=True, band=band)]
    axis = Axis(f"nats per token less than after {lengths[0]:,} tokens", zero=True)
    return line_chart("Gain from context", series, _context_axis(lengths), axis, rules=[ReferenceLine("", 0.0)], note=note)


def _loss_by_context(r: dict[str, Any], errors: list[float]) -> Markup:
    """For results that do not tell how the lengths differ target by target."""
    known = [(float(n), v, e or 0.0) for n, v, e in zip(r["context"], r["nats"], errors, strict=True) if v is not None]
    note = (
        f"The same {r['tokens']:,} targets at every length; the band is two standard errors to each side. Differences between lengths are "
        "known better than that."
    )
    series = [Series("loss", [(n, v) for n, v, _ in known], dots=True, band=[(n, v - 2 * e, v + 2 * e) for n, v, e in known])]
    return line_chart("Loss by the context given", series, _context_axis(r["context"]), Axis("nats per token"), note=note)


def _context_axis(lengths: list[int]) -> Axis:
    """With the lengths themselves as its figures, those that stand far enough apart."""
    ticks: list[float] = []
    for length in sorted(lengths, reverse=True):
        if not ticks or length * 1.4 <= ticks[-1]:
            ticks.append(float(length))
    return Axis("tokens of context", log=True, show=lambda n: f"{n:,.0f}", ticks=ticks if len(ticks) < 9 else ())


def _plain(value: Any) -> str:
    return format_si(value, 4) if isinstance(value, int | float) else str(value)


SHOWN: dict[str, Callable[[EvalResult], Child]] = {
    "bits": _bits,
    "reasoning": _reasoning,
    "context": _context,
    "fewshot": _choices,
    "gsm8k": _gsm8k,
    "harness": _harness,
    "heads": _heads,
}
"""Kinds shown here; loss by position and retrieval have sections of their own."""

TITLES = {
    "bits": "Bits per byte",
    "reasoning": "Reasoning",
    "context": "Use of context",
    "fewshot": "Multiple choice",
    "gsm8k": "Word problems (GSM8K)",
    "harness": "lm-evaluation-harness",
    "heads": "Heads",
    "position": "Loss by position",
    "retrieval": "Retrieval",
}


MOST_CELLS = 4_096
"""Of a map of retrieval."""
ENDS = {0.0: "0 % (begin)", 1.0: "100 % (end)"}
TASK_DESCRIPTIONS = {
    "single": "One fact among lines that say nothing.",
    "needles": "One fact, and the whole text is other facts.",
    "multikey": "One fact, with nine about other keys.",
    "multivalue": "All four values of one key.",
    "multiquery": "The values of four keys.",
    "variables": "All names of a chain of assignments.",
    "common": "The five words that come most often.",
    "frequent": "The three most frequent words of a Zipf distribution.",
}
"""What each task asks for."""


def position_section(record: RunData) -> Section:
    """Loss by position."""
    lead = "Mean loss of tokens by their position: it falls as long as more context helps."
    found = record.of_kind("position")
    if not found:
        fill = f"andromeda eval {shell_quote(record.path)} position"
        return Section("position", "Loss by position", lead, missing_section("Loss by position was not measured. To measure:", fill))
    return Section("position", "Loss by position", lead, [[_position(result) for result in found], provenance_notes(found, record.newest)])


def _position(result: EvalResult) -> Markup:
    try:
        edges, nats, tokens = (result.result[name] for name in ("edges", "nats", "tokens"))
        bins = [(edges[i], edges[i + 1], nats[i], tokens[i]) for i in range(len(nats))]
        # In the middle of its bin, on a scale of powers.
        points = [((max(a, 1) * max(b - 1, 1)) ** 0.5, float(v)) for a, b, v, _ in bins if v is not None]
        title = "Loss" if result.name == result.kind else result.name
        chart = line_chart(title, [Series("loss", points, dots=True)], Axis("tokens before", log=True), Axis("nats per token"), wide=True)
        rows = [[f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}", format_number(v), f"{n:,}"] for a, b, v, n in bins]
    except MALFORMED:
        return malformed_result(result)
    shown = details("As a table", table(["tokens before", "nats per token", "tokens"], rows))
    return el("div", chart, shown, class_="result")


def retrieval_section(record: RunData) -> Section:
    """Found or not, by length and depth."""
    lead = "A fact is hidden at some depth of a text and asked for at its end: how often the right answer is the most likely one."
    order = list(TASK_DESCRIPTIONS)
    found = sorted(record.of_kind("retrieval"), key=lambda r: order.index(task) if (task := r.result.get("task")) in order else len(order))
    if not found:
        fill = f"andromeda eval {shell_quote(record.path)} retrieval"
        return Section("retrieval", "Retrieval", lead, missing_section("Retrieval was not measured. To measure:", fill))
    return Section("retrieval", "Retrieval", lead, [grid([_retrieval(result) for result in found]), provenance_notes(found, record.newest)])


def _retrieval(result: EvalResult) -> Markup:
    try:
        r = result.result
        rows = ["anywhere"] if r.get("everywhere") else [ENDS.get(depth, format_percent(depth)) for depth in r["depths"]]
        if len(rows) * len(r["lengths"]) > MOST_CELLS:
            raise ValueError("more cells than a page can show")
        # The file has a row for each length; a reader looks from the top of the text to its end.
        values = [[row[i] for row in r["accuracy"]] for i in range(len(r["depths"]))]
        guessed = float(r["chance"]) if is_number(r.get("chance")) and 0 <= r["chance"] < 1 else 0.0
        shade = "Shaded from guessing" if guessed else "Guessing"
        chance = f"{shade}: {format_percent(guessed)}; {r.get('samples', 0):,} problems per cell."
        note = f"{TASK_DESCRIPTIONS.get(str(r.get('task')), '')} {chance}".strip().replace(" %", "\u00a0%")  # no line ends before the sign
        columns = [f"{length:,}" for length in r["lengths"]]
        drawn = heat_map(
            str(r.get("task", result.name)),
            rows,
            columns,
            values,
            corner="depth",
            across="columns: tokens of the text",
            low=guessed,
            note=note,
        )
    except MALFORMED:
        return malformed_result(result)
    return join(el("div", drawn, class_="result"))
