"""The measurements of an extension as sections of a page, from what benchmarks/extension.py writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from andromeda.extend.results import ORIGINAL, table, verdicts


def sections(result: dict[str, Any]) -> Iterator[str]:
    """Lines in markdown: what was trained, then a table for each length, and the furthest reading."""
    training = result["training"]
    trained, device = training["model"]["max_seq_len"], result["machine"]["gpu"] or result["machine"]["cpu"]
    yield f"## Extension of {training['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield (
        f"Trained on {training['tokens'] / 1e6:.1f} M tokens in rows of {trained:,}, on {device}; "
        f"{result['date']}. Made by `{result['command']}`. Nats of the same held-out targets with more and more text before them; "
        "retrieval is the share of notes found, over 16 depths at the longest row."
    )
    yield ""
    for to, values in sorted(result.get("extension", {}).items(), key=lambda pair: int(pair[0])):
        yield from _table(f"From {trained:,} to {int(to):,} tokens", values)
    if far := result.get("far"):
        yield from _table(f"C1: the model extended the furthest, at up to {far['wishes']['to']:,} tokens, without more training", far)


def _table(title: str, values: dict[str, Any]) -> Iterator[str]:
    columns, rows = table(values)
    yield f"### {title}"
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
    yield f"With the whole row against the trained length, paired by windows: {'; '.join(verdicts(values))}."
    yield ""
    if found := list(_depths(values)):
        yield f"Retrieval at the depth where it is worst: {'; '.join(found)}."
        yield ""


def _depths(values: dict[str, Any]) -> Iterator[str]:
    measured = [("as it was", values.get(ORIGINAL))]
    for name, stages in values["methods"].items():
        measured.append((f"{name}, trained", stages["after"]) if "after" in stages else (f"{name}, untrained", stages["untrained"]))
    for name, each in measured:
        if each and (found := each.get("retrieval")):
            worst = ", ".join(f"{min(row):.0%} at {length:,}" for length, row in zip(found["lengths"], found["accuracy"], strict=True))
            yield f"{name} {worst}"
