"""From what a user names (files, folders, `python`, `hf:...`) to units of work that readers can take independently."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from andromeda.config.data import BuildConfig
from andromeda.data.corpus import MANIFEST_NAME as MANIFEST
from andromeda.data.corpus import CorpusManifest
from andromeda.data.formats import FORMAT_BY_EXTENSION, TEXT, UNCHECKED, ReadTask, need_pyarrow, open_dataset, parquet_groups
from andromeda.utils.errors import ConfigError, DataError, nearest

TASK_BYTES = 4 << 20
PACKAGES = frozenset({"site-packages", "dist-packages"})
RANGE_BYTES = 64 << 20
"""Larger plain .jsonl files are read in ranges of this size, so that several workers share one file."""


@dataclass(frozen=True)
class SourceListing:
    """What a source holds before anything is read."""

    tasks: list[ReadTask]
    not_read: dict[str, int]
    """What a folder holds in addition: numbers of files by extension, of linked folders, and of special files (named pipes, sockets and
    devices, on which reading could wait for ever)."""
    inputs: str
    """sha256 of names, sizes and times: tells whether a source changed between two runs."""


def list_source(index: int, source: str, config: BuildConfig, as_it_is: bool = False) -> SourceListing:
    """List one source; as_it_is: a corpus whose documents are not checked again. Raises DataError when nothing can be read."""
    if source.startswith("hf:"):
        return _list_dataset(index, source)
    if source == "python" and not Path(source).exists():
        return _list_files(index, source, _python_files(), config)
    path = Path(source).expanduser()
    if (path / MANIFEST).is_file():
        return _list_corpus(index, path, UNCHECKED if as_it_is else "corpus")
    if path.is_dir():
        return _list_files(index, source, _walk(str(path)), config)
    if path.is_file():
        ending = _ending(path.name)
        if ending not in FORMAT_BY_EXTENSION and ending not in config.include:
            hint, endings = nearest(ending, FORMAT_BY_EXTENSION), " ".join(FORMAT_BY_EXTENSION)
            raise DataError(f"{source} has an unknown extension{hint}: known are {endings}; `--include {ending}` reads it as text.")
        return _list_files(index, source, iter([(path.name, str(path))]), config, only=ending)
    known = ["python"] if "/" not in source else []
    raise DataError(f"There is no file or folder {source}{nearest(source, known)}: check the path.")


def _ending(name: str) -> str:
    """The known ending of a file's name, double ones such as .jsonl.gz included, else its last suffix."""
    name = name.lower()
    return next((e for e in FORMAT_BY_EXTENSION if name.endswith(e)), os.path.splitext(name)[1])


def _walk(root: str, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Every file below a folder as (relative name, path), sorted; hidden folders and those to skip are left out.

    A linked folder is not entered, since links may form a circle: it is one entry whose name ends in a slash.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else inside + "/"
        yield from ((f"{prefix}{f}/", path) for f in folders if os.path.islink(path := os.path.join(folder, f)))
        for name in sorted(names):
            yield prefix + name, os.path.join(folder, name)


def _python_files() -> Iterator[tuple[str, str]]:
    """The .py files of this interpreter's standard library and installed packages (which may lie inside the library)."""
    packages = [p for p in sys.path if os.path.basename(p) in PACKAGES and os.path.isdir(p)]
    roots = {os.path.realpath(sysconfig.get_paths()["stdlib"]): "stdlib"} | {os.path.realpath(p): "packages" for p in packages}
    for root, label in roots.items():
        yield from ((f"{label}/{name}", path) for name, path in _walk(root, PACKAGES) if name.endswith(".py"))


def _list_files(index: int, source: str, found: Iterator[tuple[str, str]], config: BuildConfig, only: str = "") -> SourceListing:
    """Group files into units: small text files together, large containers in ranges."""
    endings = [only] if only else [e if e.startswith(".") else f".{e}" for e in config.include] or [*FORMAT_BY_EXTENSION]
    files, not_read = list[tuple[str, str]](), Counter[str]()
    for name, path in found:
        if reason := _why_not_read(name, path, endings):
            not_read[reason] += 1
        else:
            files.append((name, path))
    if not files:
        others = f" ({counted(not_read)})" if not_read else ""
        raise DataError(f"{source} holds no file that can be read{others}: known extensions are {' '.join(endings)}.")
    if config.max_bytes:  # a sample of the whole folder rather than its first files in the alphabet
        files.sort(key=lambda item: hashlib.sha256(item[0].encode("utf-8", "surrogateescape")).digest())
    digest, units, held = hashlib.sha256(), list[ReadTask](), 0
    group: list[tuple[str, str]] = []
    for name, path in files:
        size = _stamp(digest, name, path)
        kind = FORMAT_BY_EXTENSION.get(_ending(name), TEXT)
        if kind != TEXT:
            units += [*_flush(index, group, held), *_ranges(index, kind, name, path, size)]
            group, held = [], 0
            continue
        group.append((name, path))
        held += size
        if held >= TASK_BYTES or len(group) >= 2048:
            units += _flush(index, group, held)
            group, held = [], 0
    return SourceListing([*units, *_flush(index, group, held)], dict(sorted(not_read.items())), digest.hexdigest())


def _why_not_read(name: str, path: str, endings: list[str]) -> str:
    """What kind of entry this is that is not read; empty for a file that is."""
    if name.endswith("/"):
        return "linked folder"
    if _is_special(path):
        return "special file"
    ending = _ending(name)
    return "" if ending in endings else ending or "without extension"


def counted(numbers: Mapping[str, int]) -> str:
    """Numbers of files by kind, the most frequent first: `12 .rst, 3 .csv, 1 linked folder`."""
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(numbers.items(), key=lambda item: (-item[1], item[0])))


def _is_special(path: str) -> bool:
    """Whether this is neither a file nor, so that it is reported, a link to nowhere."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _stamp(digest: Any, name: str, path: str) -> int:
    """Add a file's name, size and time to the digest; returns its size (0 when it cannot be asked)."""
    try:
        status = os.stat(path)
        size, when = status.st_size, status.st_mtime_ns
    except OSError:
        size, when = 0, 0
    digest.update(f"{name}\0{size}\0{when}\n".encode("utf-8", "surrogateescape"))
    return size


def _flush(index: int, group: list[tuple[str, str]], held: int) -> list[ReadTask]:
    return [ReadTask(index, TEXT, tuple(group), size=held)] if group else []


def _ranges(index: int, kind: str, name: str, path: str, size: int) -> list[ReadTask]:
    """One container as units: byte ranges of a plain .jsonl, row groups of a .parquet, else the file as a whole."""
    files = ((name, path),)
    if kind == "jsonl":
        borders = [*range(0, max(size, 1), RANGE_BYTES), size]
        return [ReadTask(index, kind, files, a, b, b - a) for a, b in pairwise(borders)]
    if kind == "parquet":
        sizes = parquet_groups(path)
        return [ReadTask(index, kind, files, i, i + 1, held) for i, held in enumerate(sizes)]
    if name.lower().endswith(".zst"):
        need_pyarrow("Reading .zst files")
    return [ReadTask(index, kind, files, size=size)]


def _list_corpus(index: int, folder: Path, kind: str) -> SourceListing:
    """A finished corpus, decoded again: for another tokenizer on the same documents."""
    manifest = CorpusManifest.load(folder)
    units = []
    for split, report in manifest.splits.items():
        step = max(report.documents * TASK_BYTES // max(report.bytes, 1), 1)
        files = ((split, str(folder)),)
        for start in range(0, report.documents, step):
            stop = min(start + step, report.documents)
            units.append(ReadTask(index, kind, files, start, stop, (stop - start) * report.bytes // report.documents))
    return SourceListing(units, {}, manifest.fingerprint)


def _list_dataset(index: int, source: str) -> SourceListing:
    """A Hugging Face dataset `hf:name[:config][:split]`, one unit for each of its files, streamed."""
    parts = source.split(":")
    if len(parts) > 4 or not parts[1]:
        raise ConfigError(f"{source} is no dataset name: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    count = open_dataset(source).n_shards
    units = [ReadTask(index, "dataset", ((source, source),), i, count) for i in range(count)]
    return SourceListing(units, {}, hashlib.sha256(f"{source} {count}".encode()).hexdigest())
