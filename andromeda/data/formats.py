"""How each kind of file becomes documents. A reader yields a `Document` for every document, read or not, and never raises."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from andromeda.config.data import BuildConfig
from andromeda.data.corpus import open_corpus
from andromeda.data.shards import open_shard
from andromeda.data.targets import BadTarget, record_targets, record_text
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import AndromedaError, DataError, MissingExtra

TEXT = "text"
UTF8 = "utf-8-sig"
"""A byte order mark at the start of a file belongs to its encoding, not to its text."""
UNCHECKED = "corpus as it is"
"""A corpus whose documents passed the checks when it was built."""
FORMAT_BY_EXTENSION = {
    ".jsonl.gz": "packed",
    ".jsonl.zst": "packed",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".txt": TEXT,
    ".md": TEXT,
    ".py": TEXT,
    ".bin": "shard",
}
"""Endings and how they are read; the longer ones first."""


@dataclass(frozen=True)
class ReadTask:
    """A piece of reading that one worker does and that is kept once done.

    `files` are (name in reports, path); `start` and `stop` are bytes of a .jsonl, row groups of a .parquet, documents of a
    corpus, or the shard number and count of a dataset.
    """

    source: int
    kind: str
    files: tuple[tuple[str, str], ...]
    start: int = 0
    stop: int = 0
    size: int = 0
    """Bytes on disk, for progress only."""


class Document(NamedTuple):
    """One document, or the reason why there is none."""

    location: str
    text: str | None
    skip_reason: str = ""
    targets: str = ""
    """Its targets as JSON; empty where none are declared."""
    parts: tuple[int, ...] = ()
    """UTF-8 bytes of each of its texts, where it is a pair or ranking of several."""


def read_documents(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """Every document of a unit in order, with the checks on content and length applied."""
    for found in READERS[unit.kind](unit, config):
        if found.text is None or unit.kind == UNCHECKED:
            yield found
        elif config.split_documents_at:
            yield from (_checked(Document(found.location, piece), config) for piece in _split(found.text, config.split_documents_at))
        else:
            yield _checked(found, config)


def _checked(found: Document, config: BuildConfig) -> Document:
    text = found.text or ""
    if not text.strip():
        return Document(found.location, None, "empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Document(found.location, None, "not UTF-8")
    if size < config.min_document_bytes:
        return Document(found.location, None, "too short")
    if size > config.max_document_bytes:
        return Document(found.location, None, "too long")
    return found


def _split(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` UTF-8 bytes that end at line ends (\\n), or between characters of a line that is longer than that."""
    content, start = text.encode("utf-8", "surrogatepass"), 0
    while len(content) - start > limit:
        stop = content.rfind(b"\n", start, start + limit) + 1
        if stop <= start:
            stop = start + limit
            while stop > start and content[stop] & 0xC0 == 0x80:
                stop -= 1
        if stop <= start:  # a character of more bytes than the limit
            stop = next(end for end in range(start + 1, len(content) + 1) if end == len(content) or content[end] & 0xC0 != 0x80)
        yield content[start:stop].decode("utf-8", "surrogatepass")
        start = stop
    if start < len(content) or not content:
        yield content[start:].decode("utf-8", "surrogatepass")


def _read_texts(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """Whole files, one document each."""
    for name, path in unit.files:
        try:
            if os.path.getsize(path) > config.max_document_bytes and not config.split_documents_at:  # known without having it in memory
                yield Document(name, None, "too long")
                continue
            content = Path(path).read_bytes()
        except OSError as error:
            yield Document(name, None, f"unreadable: {error.strerror}")
            continue
        if b"\0" in content[:8192]:
            yield Document(name, None, "binary")
            continue
        try:
            yield Document(name, content.decode(UTF8))
        except UnicodeDecodeError:
            yield Document(name, None, "not UTF-8")


def _read_jsonl(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """The lines of a plain .jsonl that begin inside the unit's byte range."""
    name, path = unit.files[0]
    try:
        with open(path, "rb") as file:
            file.seek(max(unit.start - 1, 0))
            if unit.start:
                file.readline()
            while (at := file.tell()) < unit.stop and (line := file.readline()):
                yield from _read_line(f"{name}@{at}", line, config, first=at == 0)
    except OSError as error:
        yield Document(name, None, f"unreadable: {error.strerror}")


def _read_packed(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """The lines of a .jsonl.gz or .jsonl.zst; a damaged rest is one skipped document."""
    name, path = unit.files[0]
    try:
        with _unpacked(path) as file:
            for number, line in enumerate(file, 1):
                yield from _read_line(f"{name}:{number}", line, config, first=number == 1)
    except Exception as error:  # each library has its own family of errors for damaged data
        yield Document(name, None, f"unreadable: {type(error).__name__}")


def need_pyarrow(purpose: str) -> Any:
    """pyarrow. Raises MissingExtra, so that a build asks for it before it starts."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", purpose) from None
    return pyarrow


@contextmanager
def _unpacked(path: str) -> Iterator[IO[bytes]]:
    if path.lower().endswith(".gz"):
        with gzip.open(path) as file:
            yield cast(IO[bytes], file)
        return
    # zstandard's own reader takes a file that was cut off for one that ends there; Arrow's says so.
    with need_pyarrow("Reading .zst files").input_stream(path, compression="zstd") as raw, io.BufferedReader(raw) as file:
        yield file


def _read_line(where: str, line: bytes, config: BuildConfig, first: bool) -> Iterator[Document]:
    """The document of one JSON line, which may be the first of its file; blank lines are no documents."""
    if first:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        yield Document(where, None, "not UTF-8")
    except (ValueError, RecursionError):
        yield Document(where, None, "bad JSON")
    else:
        yield _from_row(where, row, config)


def _from_row(where: str, row: Any, config: BuildConfig) -> Document:
    """The text of a row; a missing field's reason names the fields that the row has."""
    if not isinstance(row, dict):
        return Document(where, None, "bad JSON")
    try:
        text, parts = record_text(row, config)
        if text is not None:
            return Document(where, text, targets=record_targets(row, text, parts, config), parts=tuple(parts))
    except BadTarget as error:
        return Document(where, None, f"bad target: {error}")
    fields = ", ".join(sorted(str(key) for key, value in row.items() if isinstance(value, str))[:5])
    return Document(where, None, f"no text in field {config.text_field!r} (fields with text: {fields or 'none'})")


def parquet_groups(path: str) -> list[int]:
    """Bytes of each row group of a .parquet; a file that is none has one group, which the reader then reports."""
    try:
        meta = _parquet(path).metadata
    except MissingExtra:
        raise
    except Exception:  # pyarrow's errors share no base class with OSError and ValueError alike
        return [0]
    return [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]


def _parquet(path: str) -> Any:
    return need_pyarrow("Reading .parquet files").parquet.ParquetFile(path)


def _read_parquet(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    name, path = unit.files[0]
    try:
        file = _parquet(path)
        columns = file.schema_arrow.names
        number = 0
        fields = (config.text_field, *(("prompt", "chosen", "rejected", *config.target_kinds) if config.targets else ()))
        read = [name for name in fields if name in columns] if config.text_field in columns or config.targets else columns
        for batch in file.iter_batches(row_groups=[unit.start], columns=read):
            for row in batch.to_pylist():
                yield _from_row(f"{name}:{unit.start}:{number}", row, config)
                number += 1
    except Exception as error:  # as above
        yield Document(name, None, f"unreadable: {type(error).__name__}")


def _read_shard(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """The documents of a .bin shard, decoded; its first token is the separator, as llm.c writes them."""
    name, path = unit.files[0]
    tokens: np.ndarray | None = None
    try:
        tokens = open_shard(Path(path)).view()
        tokenizer = Tokenizer.load(Path(path).parent if config.trains_tokenizer else config.tokenizer)
        starts = np.flatnonzero(tokens == tokens[0])
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield _decoded(f"{name}@{start}", tokenizer.decode_bytes(tokens[start + 1 : stop].tolist()))
    except AndromedaError:
        kind = "no tokenizer beside the shard" if tokens is not None else "no token shard"
        yield Document(name, None, f"unreadable: {kind}")


def _read_corpus(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    """Documents of a finished corpus."""
    split, folder = unit.files[0]
    corpus = open_corpus(folder, split)
    tokenizer, (tokens, offsets, _) = corpus.tokenizer, corpus.documents
    assert tokenizer is not None
    for i in range(unit.start, unit.stop):
        yield _decoded(f"{split}:{i}", tokenizer.decode_bytes(tokens.read(int(offsets[i]) + 1, int(offsets[i + 1])).tolist()))


def _decoded(where: str, content: bytes) -> Document:
    try:
        return Document(where, content.decode())
    except UnicodeDecodeError:
        return Document(where, None, "not UTF-8")


def open_dataset(source: str) -> Any:
    """The streaming dataset behind `hf:name[:config][:split]`; the split is `train` unless named."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", "Reading Hugging Face datasets") from None
    name, *rest = source.split(":")[1:]
    try:
        return load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train", streaming=True)
    except Exception as error:  # the library lets errors of many others through
        raise DataError(
            f"The dataset {source} cannot be opened ({_first_line(error)}): check its name, configuration and split, and the network."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__


def _read_dataset(unit: ReadTask, config: BuildConfig) -> Iterator[Document]:
    from datasets.distributed import split_dataset_by_node

    source = unit.files[0][1]
    part = split_dataset_by_node(open_dataset(source), rank=unit.start, world_size=unit.stop)
    try:
        for number, row in enumerate(part):
            yield _from_row(f"{source}:{unit.start}:{number}", row, config)
    except Exception as error:  # a lost connection must not pass for the end of the data
        raise DataError(f"The dataset {source} broke off ({_first_line(error)}): the same command resumes here.") from error


READERS: dict[str, Callable[[ReadTask, BuildConfig], Iterator[Document]]] = {
    TEXT: _read_texts,
    "jsonl": _read_jsonl,
    "packed": _read_packed,
    "parquet": _read_parquet,
    "shard": _read_shard,
    "corpus": _read_corpus,
    UNCHECKED: _read_corpus,
    "dataset": _read_dataset,
}
