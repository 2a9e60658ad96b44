"""Reading units into the work folder, then choosing documents: limit, exact duplicates, held-out split, order."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from andromeda.config.data import BuildConfig
from andromeda.data.formats import ReadTask, read_documents
from andromeda.data.workers import ordered_map
from andromeda.utils.errors import DataError
from andromeda.utils.files import whole_file, write_whole
from andromeda.utils.progress_callback import ProgressCallback


@dataclass(frozen=True)
class UnitIndex:
    """What one unit gave: its documents' digests (N, 32), sizes (N,) and names, and the places and reasons of those skipped."""

    digests: np.ndarray
    sizes: np.ndarray
    names: list[str]
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class DocumentTable:
    """Documents in their final order, as places in the work folder; all arrays are (N,)."""

    unit: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    source: np.ndarray
    index: np.ndarray
    """Number of the document within its unit."""

    def __len__(self) -> int:
        return len(self.unit)

    def part(self, start: int, stop: int) -> DocumentTable:
        cut = slice(start, stop)
        return DocumentTable(self.unit[cut], self.offset[cut], self.size[cut], self.source[cut], self.index[cut])

    def contents(self, work: Path) -> Iterator[bytes]:
        """The UTF-8 text of every document."""
        blob = lru_cache(maxsize=128)(_mapped)  # of this call alone: the same path may hold another build's text later
        for unit, offset, size in zip(self.unit.tolist(), self.offset.tolist(), self.size.tolist(), strict=True):
            yield blob(text_path(work, unit))[offset : offset + size]

    def targets(self, work: Path) -> Iterator[dict[str, Any]]:
        """The targets of every document by name; those that it lacks are left out."""
        lines = lru_cache(maxsize=16)(lambda unit: targets_path(work, unit).read_bytes().split(b"\n"))
        for unit, index in zip(self.unit.tolist(), self.index.tolist(), strict=True):
            yield json.loads(lines(unit)[index] or b"{}")


@dataclass(frozen=True)
class DocumentSelection:
    """The outcome of reading: two splits, and for every source what was read, kept and skipped."""

    train: DocumentTable
    val: DocumentTable
    read: list[int]
    skipped: list[Counter[str]]
    log: list[dict[str, str]]
    """One entry for every document that is not used: source, where, reason."""


def text_path(work: Path, number: int) -> Path:
    return work / f"read-{number:06d}.text"


def targets_path(work: Path, number: int) -> Path:
    return work / f"read-{number:06d}.targets"


def index_path(work: Path, number: int) -> Path:
    return work / f"read-{number:06d}.npz"


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_sources(units: list[ReadTask], work: Path, config: BuildConfig, workers: int, report: ProgressCallback) -> None:
    """Read every unit that is not yet in the work folder; units behind a source's `max_bytes` are left alone."""
    held: Counter[int] = Counter()
    total, done = sum(u.size for u in units), 0

    def wanted() -> Iterator[tuple[int, ReadTask]]:
        for number, unit in enumerate(units):
            if not config.max_bytes or held[unit.source] < config.max_bytes:
                yield number, unit

    for number, size in ordered_map(partial(_read_one, work=work, config=config), wanted(), workers):
        held[units[number].source] += size
        done += units[number].size
        report("read", done, total)
    report("read", total, total)


def _read_one(task: tuple[int, ReadTask], work: Path, config: BuildConfig) -> tuple[int, int]:
    """Read one unit to its text file and then its index, whose presence says that both are whole; returns (number, bytes)."""
    number, unit = task
    if index_path(work, number).is_file():
        return number, int(_load(work, number).sizes.sum())
    digests, sizes, names, skipped, targets = [], [], [], [], []
    held = 0
    with whole_file(text_path(work, number)) as file:
        for found in read_documents(unit, config):
            if found.text is None:
                skipped.append((found.location, found.skip_reason))
                continue
            content = found.text.encode()
            file.write(content)
            digests.append(hashlib.sha256(content + repr(found.parts).encode() if found.parts else content).digest())
            targets.append(found.targets)
            sizes.append(len(content))
            names.append(found.location)
            held += len(content)
            if config.max_bytes and held >= config.max_bytes:
                break
    if config.targets:
        write_whole(targets_path(work, number), "\n".join(targets).encode())
    buffer = io.BytesIO()
    np.savez(
        buffer,
        digests=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32),
        sizes=np.array(sizes, dtype=np.int64),
        words=np.frombuffer(json.dumps([names, skipped]).encode(), dtype=np.uint8),
    )
    write_whole(index_path(work, number), buffer.getvalue())
    return number, held


def _load(work: Path, number: int) -> UnitIndex:
    with np.load(index_path(work, number)) as index:
        names, skipped = json.loads(index["words"].tobytes())
        return UnitIndex(index["digests"], index["sizes"], names, [(where, reason) for where, reason in skipped])


def select(units: list[ReadTask], sources: list[str], work: Path, config: BuildConfig) -> DocumentSelection:
    """Choose and order the documents. A pure function of what was read, in the order of the units.

    Documents are sorted by the sha256 of their text; the held-out split is the beginning of that order, so a document is
    held out or not by its content alone. At least one document is on either side.
    """
    books = _SourceCounts(sources, [0] * len(sources), [Counter() for _ in sources], [])
    columns = [_within_limit(number, unit, work, config, books) for number, unit in enumerate(units)]
    digests, unit, offset, size, source, index = (np.concatenate(c) for c in zip(*columns, strict=True))
    words = np.ascontiguousarray(digests).view(">u8")
    order = np.lexsort(words.T[::-1])  # stable: of equal documents the first one read comes first
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    _log_duplicates(order[again], unit, offset, size, source, work, books)
    order = order[~again]
    if len(order) < 2:
        raise DataError(_too_few(len(order), sources, books.skipped))
    limit = np.uint64(int(config.validation_fraction * 2.0**64))
    held_out = min(max(int(np.searchsorted(words[order, 0].astype(np.uint64), limit)), 1), len(order) - 1)
    documents = DocumentTable(unit[order], offset[order], size[order], source[order], index[order])
    return DocumentSelection(documents.part(held_out, len(order)), documents.part(0, held_out), books.read, books.skipped, books.log)


@dataclass
class _SourceCounts:
    """The account that `select` keeps, by source."""

    sources: list[str]
    read: list[int]
    skipped: list[Counter[str]]
    log: list[dict[str, str]]
    held: int = 0
    current: int = -1

    def skip(self, source: int, where: str, reason: str) -> None:
        self.skipped[source][reason] += 1
        self.log.append({"source": self.sources[source], "where": where, "reason": reason})


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _within_limit(number: int, unit: ReadTask, work: Path, config: BuildConfig, books: _SourceCounts) -> Columns:
    """The documents of a unit that its source's `max_bytes` leaves room for: digests, unit, offset, size, source, index."""
    if unit.source != books.current:
        books.current, books.held = unit.source, 0
    empty = np.zeros(0, dtype=np.int64)
    if config.max_bytes and books.held >= config.max_bytes:
        return np.zeros((0, 32), dtype=np.uint8), empty, empty, empty, empty, empty
    harvest = _load(work, number)
    ends = books.held + np.cumsum(harvest.sizes)
    count = int(np.searchsorted(ends, config.max_bytes, side="right")) if config.max_bytes else len(ends)
    books.held = int(ends[-1]) if len(ends) else books.held
    books.read[unit.source] += len(ends) + len(harvest.skipped)
    for where, reason in harvest.skipped:
        books.skip(unit.source, where, reason)
    for where in harvest.names[count:]:
        books.skip(unit.source, where, "over max_bytes")
    sizes = harvest.sizes[:count]
    return (
        harvest.digests[:count],
        np.full(count, number),
        np.cumsum(sizes) - sizes,
        sizes,
        np.full(count, unit.source),
        np.arange(count),
    )


def _log_duplicates(
    which: np.ndarray, unit: np.ndarray, offset: np.ndarray, size: np.ndarray, source: np.ndarray, work: Path, books: _SourceCounts
) -> None:
    """Book every document whose text came before."""
    named = lru_cache(maxsize=8)(partial(_places, work))
    for i in sorted(which.tolist()):
        books.skip(int(source[i]), named(int(unit[i]))[int(offset[i]), int(size[i])], "duplicate")


def _places(work: Path, number: int) -> dict[tuple[int, int], str]:
    """Names of a unit's documents by (offset, size)."""
    harvest = _load(work, number)
    offsets = np.cumsum(harvest.sizes) - harvest.sizes
    return dict(zip(zip(offsets.tolist(), harvest.sizes.tolist(), strict=True), harvest.names, strict=True))


def _too_few(count: int, sources: list[str], skipped: list[Counter[str]]) -> str:
    """Why nothing can be built, with the commonest reasons."""
    reasons = sum(skipped, Counter())
    why = "; ".join(f"{reason} {n}" for reason, n in reasons.most_common(3))
    if count == 1:
        fix = "split long texts with `--split-documents-at 20000` or add more"
        return f"Only one document is left, so none could be held out ({why or 'one file'}): {fix}."
    options = "--text-field, --min-document-bytes, --max-document-bytes"
    return f"No document is left of {', '.join(sources)} ({why or 'nothing was read'}): check the files and {options}."
