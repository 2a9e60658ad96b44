"""The model card (arXiv 1810.03993): what the model is, what it was made from, what it is for, what is not known of it."""

from __future__ import annotations

from typing import Any

from andromeda.evaluate.result import Result
from andromeda.plan.parameters import Parameters
from andromeda.report.architecture_text import architecture
from andromeda.report.parts import command, quoted
from andromeda.report.record import Record
from andromeda.report.summary import standing
from andromeda.utils.formatting import duration, figure, percent
from andromeda.utils.html import Child, Section, facts

USE = (
    "Continues text of the kind that it was trained on. It was trained to predict the next token and nothing else: it follows no "
    "instructions, knows no facts reliably, and its text must not be taken for advice."
)
LIMITS = (
    "What it writes can be wrong, biased or copied from its training text; nothing was filtered after training. Whoever gives it to "
    "others should measure what their use needs, and check the rights in the training text."
)


def card(record: Record, counted: Parameters | None) -> Section:
    """The section."""
    lead = "For whoever is given the model: what it is, what it was made from, what it can be used for."
    size = f"{counted.total:,} parameters" if counted else "parameters of a user's own class"
    pairs: list[tuple[str, Child]] = [
        ("Model", f"{record.config.name}: {size}; {architecture(record.config.model)}"),
        ("Made with", f"Andromeda {_start(record, 'versions').get('andromeda', '')}, {standing(record)}"),
        ("Training data", _data(record)),
        ("Training", _training(record)),
        ("Measured", _measured(record)),
        ("Use", USE),
        ("Limits", LIMITS),
        ("To run it", command(f'andromeda generate {quoted(record.path)} "..."')),
        ("To make it again", _again(record)),
    ]
    return Section("card", "Model card", lead, facts(pairs))


def _start(record: Record, name: str) -> dict[str, Any]:
    starts = record.manifest.get("starts") or [{}]
    found = starts[-1].get(name) if isinstance(starts[-1], dict) else None
    return found if isinstance(found, dict) else {}


def _data(record: Record) -> str:
    told = []
    for path, corpus in record.corpora.items():
        train = corpus.splits.get("train")
        sources = ", ".join(source.name for source in corpus.sources)
        told.append(f"{sources} ({path}): {train.documents:,} documents, {train.tokens:,} tokens" if train else path)
    told = told or [path for path in [record.config.data.corpus, *(s.path for s in record.config.data.sources)] if path]
    learned = record.metrics.last("tokens")
    return ("; ".join(told) or "not recorded") + (f". Learned from {learned:,.0f} tokens of it" if learned else "") + "."


def _training(record: Record) -> str:
    train, seconds = record.config.train, record.metrics.last("seconds")
    rows = train.seq_len or record.config.model.max_seq_len
    time = f", {duration(seconds)} in steps" if seconds else ""
    machine = _start(record, "machine").get("processor")
    where = f" on {machine}" if machine else ""
    batch = f"{train.steps:,} steps of {train.batch_size} rows of {rows:,} tokens"
    return f"{train.optim.kind}, {batch}, {train.schedule.kind} schedule{time}{where}."


def _measured(record: Record) -> str:
    told = [f"{figure(r.result.get('bits_per_byte'))} bits per byte{_of(r)}" for r in record.of_kind("bits")]
    for result in record.of_kind("reasoning"):
        scores = [f"{task} {percent(s.get('in'))}" for task, s in result.result.items() if isinstance(s, dict)]
        told.append("reasoning: " + ", ".join(scores))
    if not told and (bits := record.metrics.last("validation/bits_per_byte")):
        told.append(f"{figure(bits)} bits per byte on held-out text, while training")
    return ("; ".join(told) + ".") if told else "nothing yet."


def _of(result: Result) -> str:
    """What a result was measured on, where its name says so."""
    return " of held-out text" if result.name == result.kind else f" ({result.name})"


def _again(record: Record) -> Child:
    starts = record.manifest.get("starts") or []
    first = starts[0] if starts and isinstance(starts[0], dict) else {}
    return command(first["command"]) if first.get("command") else None
