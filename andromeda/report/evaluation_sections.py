"""What the model can do, measured after training: every result of the run folder, each with the command that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from andromeda.evaluate.result import EvalResult
from andromeda.report.fragments import MALFORMED, code, malformed_result, missing_section, provenance_notes, shell_quote
from andromeda.report.run_data import RunData, held_out_bits
from andromeda.utils.formatting import format_number, format_percent, format_si
from andromeda.utils.html import Axis, Child, Markup, Section, Series, details, el, grid, heat_map, join, line_chart, table

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
    """The yardstick of the demo: what general compressors need for the same bytes."""
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


def _context(result: EvalResult) -> Markup:
    r = result.result
    lengths, nats, errors = r["context"], r["nats"], r.get("error") or [0.0] * len(r["nats"])
    points = [(float(n), v) for n, v in zip(lengths, nats, strict=True) if v is not None]
    band = [(float(n), v - 2 * (e or 0.0), v + 2 * (e or 0.0)) for n, v, e in zip(lengths, nats, errors, strict=True) if v is not None]
    note = f"The same {r['tokens']:,} targets at every length; the band is two standard errors wide to each side."
    series = [Series("loss", points, dots=True, band=band)]
    chart = line_chart("Loss by the context given", series, Axis("tokens of context", log=True), Axis("nats per token"), note=note)
    rows = [[f"{n:,}", format_number(v), format_number(e, 2)] for n, v, e in zip(lengths, nats, errors, strict=True)]
    return join(grid(chart), details("As a table", table(["context", "nats per token", "standard error"], rows)))


def _plain(value: Any) -> str:
    return format_si(value, 4) if isinstance(value, int | float) else str(value)


SHOWN: dict[str, Callable[[EvalResult], Child]] = {
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
        # The file has a row for each length; a reader looks from the top of the text to its end.
        values = [[row[i] for row in r["accuracy"]] for i in range(len(r["depths"]))]
        chance = f"Guessing: {format_percent(r.get('chance'))}; {r.get('samples', 0):,} problems per cell."
        note = f"{TASK_DESCRIPTIONS.get(str(r.get('task')), '')} {chance}".strip().replace(" %", "\u00a0%")  # no line ends before the sign
        columns = [f"{length:,}" for length in r["lengths"]]
        drawn = heat_map(
            str(r.get("task", result.name)), rows, columns, values, corner="depth", across="columns: tokens of the text", note=note
        )
    except MALFORMED:
        return malformed_result(result)
    return join(el("div", drawn, class_="result"))
