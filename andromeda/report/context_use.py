"""How far the model looks: loss by position, and whether a fact is found wherever it stands."""

from __future__ import annotations

from andromeda.evaluate.result import Result
from andromeda.report.parts import MISSHAPEN, damaged, empty, origins, quoted
from andromeda.report.record import Record
from andromeda.utils.formatting import figure, percent
from andromeda.utils.html import Axis, Html, Section, Series, details, el, grid, heat, join, lines, table

ENDS = {0.0: "0 % (begin)", 1.0: "100 % (end)"}
WHAT = {
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


def position(record: Record) -> Section:
    """Loss by position."""
    lead = "Mean loss of tokens by where they stand: it falls as long as what stands before is of use."
    found = record.of_kind("position")
    if not found:
        fill = f"andromeda eval {quoted(record.path)} position"
        return Section("position", "Loss by position", lead, empty("Loss by position was not measured. To measure:", fill))
    return Section("position", "Loss by position", lead, [[_position(result) for result in found], origins(found, record.newest)])


def _position(result: Result) -> Html:
    try:
        edges, nats, tokens = (result.result[name] for name in ("edges", "nats", "tokens"))
        bins = [(edges[i], edges[i + 1], nats[i], tokens[i]) for i in range(len(nats))]
        # In the middle of its bin, on a scale of powers.
        points = [((max(a, 1) * max(b - 1, 1)) ** 0.5, float(v)) for a, b, v, _ in bins if v is not None]
        title = "Loss" if result.name == result.kind else result.name
        chart = lines(title, [Series("loss", points, dots=True)], Axis("tokens before", log=True), Axis("nats per token"), wide=True)
        rows = [[f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}", figure(v), f"{n:,}"] for a, b, v, n in bins]
    except MISSHAPEN:
        return damaged(result)
    shown = details("As a table", table(["tokens before", "nats per token", "tokens"], rows))
    return el("div", chart, shown, class_="result")


def retrieval(record: Record) -> Section:
    """Found or not, by length and depth."""
    lead = "Something is hidden in a text, so deep, and asked for at its end: how often the model finds the right answer likeliest."
    order = list(WHAT)
    found = sorted(record.of_kind("retrieval"), key=lambda r: order.index(task) if (task := r.result.get("task")) in order else len(order))
    if not found:
        fill = f"andromeda eval {quoted(record.path)} retrieval"
        return Section("retrieval", "Retrieval", lead, empty("Retrieval was not measured. To measure:", fill))
    return Section("retrieval", "Retrieval", lead, [grid([_retrieval(result) for result in found]), origins(found, record.newest)])


def _retrieval(result: Result) -> Html:
    try:
        r = result.result
        rows = ["anywhere"] if r.get("everywhere") else [ENDS.get(depth, percent(depth)) for depth in r["depths"]]
        # The file has a row for each length; a reader looks from the top of the text to its end.
        values = [[row[i] for row in r["accuracy"]] for i in range(len(r["depths"]))]
        told = f"{WHAT.get(str(r.get('task')), '')} Guessing: {percent(r.get('chance'))}; {r.get('samples', 0):,} problems a cell."
        note = told.strip().replace(" %", "\u00a0%")  # no line ends before the sign
        columns = [f"{length:,}" for length in r["lengths"]]
        drawn = heat(
            str(r.get("task", result.name)), rows, columns, values, corner="depth", across="columns: tokens of the text", note=note
        )
    except MISSHAPEN:
        return damaged(result)
    return join(el("div", drawn, class_="result"))
