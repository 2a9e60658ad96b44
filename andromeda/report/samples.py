"""What the model wrote."""

from __future__ import annotations

from itertools import groupby

from andromeda.report.parts import empty, quoted
from andromeda.report.record import Record, Sample
from andromeda.utils.html import Html, Section, el


def samples(record: Record) -> Section:
    """The section."""
    lead = "As they came, none left out; what was given is in color."
    if not record.samples:
        fill = f'andromeda generate {quoted(record.path)} "Once" --json > {quoted(record.path / "samples" / "mine.jsonl")}'
        return Section("samples", "Samples", lead, empty("No samples are kept. To add some:", fill))
    parts = []
    for file, group in groupby(record.samples, key=lambda s: s.file):
        parts += [el("h3", el("code", f"samples/{file}")), *(_sample(s) for s in group)]
    return Section("samples", "Samples", lead, parts)


def _sample(sample: Sample) -> Html:
    note = el("figcaption", el("span", sample.about, class_="unit")) if sample.about else None
    text = el("pre", el("span", sample.prompt, class_="prompt") if sample.prompt else None, sample.text)
    return el("figure", note, text, class_="sample")
