"""What the model can do, measured after training: every result of the run folder, each with the command that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from andromeda.evaluate.result import Result
from andromeda.report.parts import MISSHAPEN, command, damaged, empty, origins, quoted
from andromeda.report.record import Record
from andromeda.report.summary import held_out_bits
from andromeda.utils.formatting import figure, percent, short
from andromeda.utils.html import Axis, Child, Html, Series, details, el, grid, join, lines, table
from andromeda.utils.html.page import Section

COMMANDS = ("bits", "reasoning", "context")
"""Kinds that `andromeda eval` measures quickly on any machine."""


def evaluations(record: Record) -> Section:
    """The section."""
    lead = ["Measured on the trained weights; each result is made again by its command and checked by ", command("andromeda verify"), "."]
    found = [result for kind in SHOWN for result in record.of_kind(kind)]
    parts = [part for part in (_compressors(record), *(_one(result) for result in found)) if part]
    notes = [el("p", problem, class_="empty") for problem in record.problems]
    commands = [f"andromeda eval {quoted(record.path)} {kind}" for kind in COMMANDS]
    shown = grid(*parts, kind="two") if parts else empty("Nothing was evaluated yet. To measure:", *commands)
    return Section("evaluation", "Evaluation", lead, join(notes, shown, origins(found, record.newest)))


def _one(result: Result) -> Html:
    try:
        body = SHOWN[result.kind](result)
    except MISSHAPEN:
        body = damaged(result)
    name = el("small", f" {result.name}") if result.name != result.kind else None
    return el("div", el("h3", TITLES[result.kind], name), body, class_="result")


def _compressors(record: Record) -> Html | None:
    """The yardstick of the demo: what general compressors need for the same bytes."""
    bits = held_out_bits(record)
    if bits is None or not record.compressors:
        return None
    others = [[f"{name} -9", figure(value)] for name, value in record.compressors.items()]
    rows = [["this model", figure(bits)], *others]
    return el("div", el("h3", "Beside compressors"), table(["held-out text", "bits per byte"], rows), class_="result")


def _bits(result: Result) -> Html:
    r = result.result
    head = ["bits per byte", "nats per token", "tokens", "bytes"]
    return table(head, [[figure(r["bits_per_byte"]), figure(r["loss"]), f"{r['tokens']:,}", f"{r['bytes']:,}"]], text=0)


def _reasoning(result: Result) -> Html:
    rows = [
        [task, percent(r.get("in")), percent(r.get("chance")), percent(r.get("out")), percent(r.get("chance_out"))]
        for task, r in result.result.items()
        if isinstance(r, dict)
    ]
    note = "Usual: as in the probes of training. Harder: larger than any problem there, out of distribution. Exact answers only."
    return join(table(["task", "usual", "guessing", "harder", "guessing"], rows), el("p", note, class_="note"))


def _choices(result: Result) -> Html:
    r = result.result
    row = [percent(r["accuracy"]), percent(r.get("normalized")), percent(r.get("chance")), f"{r['questions']:,}", str(r["shots"])]
    return table(["right", "right, by length", "guessing", "questions", "examples shown"], [row], text=0)


def _gsm8k(result: Result) -> Html:
    r = result.result
    row = [percent(r["exact_match"]), percent(r.get("answered")), f"{r['questions']:,}", str(r["shots"])]
    return table(["right", "answered", "questions", "examples shown"], [row], text=0)


def _harness(result: Result) -> Html:
    rows = [[task, metric, _plain(value)] for task, metrics in result.result.items() for metric, value in metrics.items()]
    return table(["task", "metric", "figure"], rows, text=2)


def _context(result: Result) -> Html:
    r = result.result
    lengths, nats, errors = r["context"], r["nats"], r.get("error") or [0.0] * len(r["nats"])
    points = [(float(n), v) for n, v in zip(lengths, nats, strict=True) if v is not None]
    band = [(float(n), v - 2 * (e or 0.0), v + 2 * (e or 0.0)) for n, v, e in zip(lengths, nats, errors, strict=True) if v is not None]
    note = f"The same {r['tokens']:,} targets at every length; the band is two standard errors wide to each side."
    series = [Series("loss", points, dots=True, band=band)]
    chart = lines("Loss by the context given", series, Axis("tokens of context", log=True), Axis("nats per token"), note=note)
    rows = [[f"{n:,}", figure(v), figure(e, 2)] for n, v, e in zip(lengths, nats, errors, strict=True)]
    return join(grid(chart), details("As a table", table(["context", "nats per token", "standard error"], rows)))


def _plain(value: Any) -> str:
    return short(value, 4) if isinstance(value, int | float) else str(value)


SHOWN: dict[str, Callable[[Result], Child]] = {
    "bits": _bits,
    "reasoning": _reasoning,
    "context": _context,
    "fewshot": _choices,
    "gsm8k": _gsm8k,
    "harness": _harness,
}
"""Kinds shown here; loss by position and retrieval have sections of their own."""

TITLES = {
    "bits": "Bits per byte",
    "reasoning": "Reasoning",
    "context": "Use of context",
    "fewshot": "Multiple choice",
    "gsm8k": "Word problems (GSM8K)",
    "harness": "lm-evaluation-harness",
    "position": "Loss by position",
    "retrieval": "Retrieval",
}
