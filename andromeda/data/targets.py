"""Targets of documents besides their tokens: read from the fields of a record, kept beside the tokens, and found for a sequence.

`andromeda data build --target NAME=KIND` takes the field NAME of every record:

    label     text, a whole number or a truth value: one class of the document
    labels    a list of those: the labels that the document has, of all that occur
    spans     a list of [start, end, label], in characters from 0, end excluded: a class for each token; class 0 is outside of all spans
    number    a number
    pair      fields `chosen` and `rejected` (and `prompt`, which both begin with) in place of a text: two documents, the better one first
    ranking   a list of texts, best first (and `prompt`): several documents

A record without the field, or with null, has no such target, and does not count for the head that predicts it. Targets of a document are
at its last token, so that whoever reads them has read it all; those of a ranked document at the last token of each text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from andromeda.config.base import BaseConfig, StringTuple
from andromeda.config.data import RANKED, BuildConfig
from andromeda.config.heads import MAX_ITEMS, MAX_LABELS
from andromeda.utils.errors import DataError

OUTSIDE = "O"
"""Name of class 0 of spans."""
NO_CLASS, NO_LABEL = -100, 255
"""A class that does not count, and a label of which it is not known whether it is there."""
RANK_STRIDE = MAX_ITEMS
"""A ranked token has RANK_STRIDE * group + rank; groups are numbered within a sequence."""


class TargetReport(BaseConfig):
    """What is known of one target."""

    kind: str
    labels: StringTuple = ()
    """Names of the classes or labels, by number."""
    documents: int = 0
    """Training documents that have it."""
    mean: float = 0.0
    """Of a number, over the training documents."""
    std: float = 1.0
    whole: bool = False
    """Whether all numbers of training documents are whole and not negative: then they may be classes, counts or quantities."""


class BadTarget(ValueError):
    """A field that is not what its kind asks for."""


def record_text(row: Mapping[str, Any], config: BuildConfig) -> tuple[str | None, list[int]]:
    """Text of a record, and the UTF-8 bytes of each of its documents where it holds several. Raises BadTarget."""
    for name, kind in config.target_kinds.items():
        if kind in RANKED and (texts := _ranked_texts(row, name, kind)) is not None:
            prompt = row.get("prompt") or ""
            if not isinstance(prompt, str):
                raise BadTarget("prompt is no text")
            whole = [prompt + text for text in texts]
            return "".join(whole), [len(text.encode("utf-8", "surrogatepass")) for text in whole]
    text = row.get(config.text_field)
    return (text if isinstance(text, str) else None), []


def _ranked_texts(row: Mapping[str, Any], name: str, kind: str) -> list[str] | None:
    texts = [row.get("chosen"), row.get("rejected")] if kind == "pair" else row.get(name)
    if texts is None or texts == [None, None]:
        return None
    if not isinstance(texts, list) or not 2 <= len(texts) <= MAX_ITEMS or not all(isinstance(text, str) and text for text in texts):
        raise BadTarget(f"{name} is not {'chosen and rejected' if kind == 'pair' else f'a list of 2 to {MAX_ITEMS} texts'}")
    return texts


def record_targets(row: Mapping[str, Any], text: str, parts: list[int], config: BuildConfig) -> str:
    """The targets of a record as JSON, as the work folder keeps them; empty where there are none declared. Raises BadTarget."""
    if not config.targets:
        return ""
    found: dict[str, Any] = {}
    for name, kind in config.target_kinds.items():
        if kind in RANKED:
            if parts:
                found[name] = parts
        elif (value := row.get(name)) is not None:
            found[name] = _READ[kind](name, value, text)
    return json.dumps(found)


def _label(name: str, value: Any, text: str = "") -> str:
    del text
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int) or value == "":
        raise BadTarget(f"{name} is no label")
    return str(value)


def _labels(name: str, value: Any, text: str) -> list[str]:
    if not isinstance(value, list):
        raise BadTarget(f"{name} is no list of labels")
    return [_label(name, one, text) for one in value]


def _number(name: str, value: Any, text: str) -> float:
    del text
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e30:
        raise BadTarget(f"{name} is no number")
    return float(value)


def _spans(name: str, value: Any, text: str) -> list[list[Any]]:
    """[first byte, byte after the last, label] of each span."""
    if not isinstance(value, list):
        raise BadTarget(f"{name} is no list of spans")
    found = []
    for one in value:
        span = [one.get("start"), one.get("end"), one.get("label")] if isinstance(one, dict) else one
        if not isinstance(span, list) or len(span) != 3 or not all(type(place) is int for place in span[:2]):
            raise BadTarget(f"{name} has a span that is not [start, end, label]")
        start, end, label = span
        if not 0 <= start < end <= len(text):
            raise BadTarget(f"{name} has a span outside of its text")
        before = len(text[:start].encode("utf-8", "surrogatepass"))
        found.append([before, before + len(text[start:end].encode("utf-8", "surrogatepass")), _label(name, label)])
    return found


_READ: dict[str, Callable[[str, Any, str], Any]] = {"label": _label, "labels": _labels, "number": _number, "spans": _spans}


def describe_targets(config: BuildConfig, train: Iterable[Mapping[str, Any]], val: Iterable[Mapping[str, Any]]) -> dict[str, TargetReport]:
    """What is known of each target, from those of all documents. Raises DataError where one never occurs or has too many labels."""
    names: dict[str, set[str]] = {name: set() for name in config.target_kinds}
    counts = dict.fromkeys(names, 0)
    numbers: dict[str, list[float]] = {name: [] for name, kind in config.target_kinds.items() if kind == "number"}
    for documents, training in ((train, 1), (val, 0)):
        for document in documents:
            for name, value in document.items():
                counts[name] += training
                names[name].update(_names(config.target_kinds[name], value))
                if name in numbers and training:
                    numbers[name].append(value)
    return {
        name: _report(name, kind, names[name], counts[name], np.array(numbers.get(name, ()))) for name, kind in config.target_kinds.items()
    }


def _names(kind: str, value: Any) -> list[str]:
    """Labels that a target has."""
    if kind == "label":
        return [value]
    return list(value) if kind == "labels" else [span[2] for span in value] if kind == "spans" else []


def _report(name: str, kind: str, names: set[str], count: int, numbers: np.ndarray) -> TargetReport:
    if not count:
        raise DataError(f"No training document has the target {name!r}: check --target and the field of the records.")
    # Numbers in their own order, so that class 10 comes after class 9.
    ordered = sorted(
        names, key=lambda label: (not label.lstrip("-").isdecimal(), int(label) if label.lstrip("-").isdecimal() else 0, label)
    )
    labels = (OUTSIDE, *(label for label in ordered if label != OUTSIDE)) if kind == "spans" else tuple(ordered)
    if len(labels) > MAX_LABELS:
        raise DataError(f"The target {name!r} has {len(labels)} different labels, more than {MAX_LABELS}: check that it is no free text.")
    if not len(numbers):
        return TargetReport(kind=kind, labels=labels, documents=count)
    return TargetReport(
        kind=kind,
        documents=count,
        mean=float(numbers.mean()),
        std=float(numbers.std()) or 1.0,
        whole=bool((numbers >= 0).all() and (numbers == numbers.round()).all()),
    )


def encode_targets(
    reports: Mapping[str, TargetReport], documents: Iterable[Mapping[str, Any]], tokens: Iterator[np.ndarray], byte_lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays that a split keeps, by name. documents: targets of each; tokens: ids of each, the separator first.

    label (N,) int32, labels (N, K) uint8, number (N,) float64, spans (tokens,) int16, pair and ranking (M, 2) int64: the places of the
    last token of each ranked text and its rank.
    """
    numbers = {name: {label: i for i, label in enumerate(report.labels)} for name, report in reports.items()}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in reports}
    before = 0
    for targets, ids in zip(documents, tokens, strict=True):
        ends = np.cumsum(byte_lengths[ids])
        for name, report in reports.items():
            columns[name].append(_ENCODE[report.kind](targets.get(name), numbers[name], ends, before))
        before += len(ids)
    return {name: np.concatenate(column) for name, column in columns.items()}


def _encode_label(value: Any, numbers: Mapping[str, int], ends: np.ndarray, before: int) -> np.ndarray:
    del ends, before
    return np.array([NO_CLASS if value is None else numbers[value]], dtype=np.int32)


def _encode_labels(value: Any, numbers: Mapping[str, int], ends: np.ndarray, before: int) -> np.ndarray:
    del ends, before
    row = np.full((1, len(numbers)), NO_LABEL if value is None else 0, dtype=np.uint8)
    row[0, [numbers[label] for label in value or ()]] = 1
    return row


def _encode_number(value: Any, numbers: Mapping[str, int], ends: np.ndarray, before: int) -> np.ndarray:
    del numbers, ends, before
    return np.array([math.nan if value is None else value], dtype=np.float64)


def _encode_spans(value: Any, numbers: Mapping[str, int], ends: np.ndarray, before: int) -> np.ndarray:
    """A token has the class of the last span that it overlaps; tokens without text, such as the separator, have none."""
    del before
    row = np.full(len(ends), NO_CLASS if value is None else 0, dtype=np.int16)
    starts = np.concatenate([[0], ends[:-1]])
    for first, last, label in value or ():
        row[(ends > first) & (starts < last)] = numbers[label]
    row[starts == ends] = NO_CLASS
    return row


def _encode_ranks(value: Any, numbers: Mapping[str, int], ends: np.ndarray, before: int) -> np.ndarray:
    """Each text ends at the last token that has any of its bytes."""
    del numbers
    if value is None:
        return np.zeros((0, 2), dtype=np.int64)
    places = np.searchsorted(ends, np.cumsum(value))
    return np.stack([before + places, np.arange(len(value))], axis=1).astype(np.int64)


_ENCODE = {
    "label": _encode_label,
    "labels": _encode_labels,
    "number": _encode_number,
    "spans": _encode_spans,
    "pair": _encode_ranks,
    "ranking": _encode_ranks,
}


@dataclass(frozen=True)
class TargetColumn:
    """One target of a split of a corpus."""

    report: TargetReport
    values: np.ndarray
    """As `encode_targets` returns it."""

    def check(self, documents: int, tokens: int) -> bool:
        """Whether the array has the type and shape of its kind."""
        shape, kind = {
            "label": ((documents,), "i"),
            "labels": ((documents, len(self.report.labels)), "u"),
            "number": ((documents,), "f"),
            "spans": ((tokens,), "i"),
        }.get(self.report.kind, ((len(self.values), 2), "i"))
        return bool(self.values.shape == shape and self.values.dtype.kind == kind)

    def at(self, positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The target of the tokens at `positions` (T,) of the corpus, -1 for padding: (T,), or (T, K) for labels.

        offsets: where each document of the corpus begins. Raises DataError for classes that do not exist.
        """
        document = np.searchsorted(offsets, np.maximum(positions, 0), side="right") - 1
        last = (positions >= 0) & (positions == offsets[document + 1] - 1)
        kind = self.report.kind
        if kind in RANKED:
            return self._ranks(positions, document)
        if kind == "number":
            return np.where(last, self.values[document], math.nan)
        if kind == "labels":
            return np.where(last[:, None], self.values[document], np.uint8(NO_LABEL))
        found = (
            np.where(positions >= 0, self.values[positions], NO_CLASS)
            if kind == "spans"
            else np.where(last, self.values[document], NO_CLASS)
        )
        if found.max(initial=0) >= len(self.report.labels) or found.min(initial=0) < NO_CLASS:
            raise DataError(f"A target of the corpus has classes beyond its {len(self.report.labels)} labels: build the corpus again.")
        return found.astype(np.int64)

    def _ranks(self, positions: np.ndarray, document: np.ndarray) -> np.ndarray:
        """RANK_STRIDE * group + rank at the last tokens of ranked texts; groups are the documents of the corpus, numbered from 0."""
        place = np.searchsorted(self.values[:, 0], positions)
        inside = np.minimum(place, max(len(self.values) - 1, 0))
        ranked = (positions >= 0) & (self.values[inside, 0] == positions) if len(self.values) else np.zeros(len(positions), dtype=bool)
        found = np.full(len(positions), NO_CLASS, dtype=np.int64)
        groups = np.unique(document[ranked], return_inverse=True)[1]
        found[ranked] = groups * RANK_STRIDE + np.clip(self.values[inside[ranked], 1], 0, RANK_STRIDE - 1)
        return found

    def missing(self, length: int) -> np.ndarray:
        """The target of `length` tokens that have none."""
        if self.report.kind == "number":
            return np.full(length, math.nan)
        if self.report.kind == "labels":
            return np.full((length, len(self.report.labels)), NO_LABEL, dtype=np.uint8)
        return np.full(length, NO_CLASS, dtype=np.int64)
