"""From chosen documents to token shards: blocks are encoded by workers, then written out in order."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from andromeda.data.corpus import ShardReport, SplitReport, target_file
from andromeda.data.ingest import DocumentTable
from andromeda.data.shards import TokenArray, open_shard, token_dtype, write_shard
from andromeda.data.targets import TargetReport, encode_targets
from andromeda.data.tokenizer import Tokenizer
from andromeda.data.workers import ordered_map
from andromeda.utils.errors import DataError
from andromeda.utils.files import sha256_of, whole_file, write_whole
from andromeda.utils.progress_callback import ProgressCallback

BLOCK_BYTES = 4 << 20
CHUNK = 1 << 18
WORD_END = re.compile(r"(?<=[^\W_])\n")


@dataclass(frozen=True)
class EncodeTask:
    """Neighboring documents of one split that are encoded together."""

    path: Path
    work: Path
    tokenizer: Path
    fingerprint: str
    """Of the tokenizer, which is kept between blocks."""
    documents: DocumentTable
    ranked: str
    """The target whose documents hold several texts, with a separator before each; empty where there is none."""


def encode_split(
    split: str,
    documents: DocumentTable,
    work: Path,
    folder: Path,
    fingerprint: str,
    workers: int,
    report: ProgressCallback,
    ranked: str = "",
) -> list[Path]:
    """Encode a split into block files, those that exist already excepted; returns them in order. ranked: as in EncodeTask."""
    ends = np.cumsum(documents.size)
    total = int(ends[-1])
    numbers = (ends - documents.size) // BLOCK_BYTES
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(documents)]
    blocks = [
        EncodeTask(work / f"{split}-{i:06d}.npz", work, folder, fingerprint, documents.part(a, b), ranked)
        for i, (a, b) in enumerate(pairwise(borders))
    ]
    for stop, _ in zip(borders[1:], ordered_map(_encode, blocks, workers), strict=True):
        report(f"encode {split}", int(ends[stop - 1]), total)
    return [block.path for block in blocks]


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, fingerprint: str) -> tuple[Tokenizer, np.ndarray]:
    tokenizer = Tokenizer.load(folder)
    return tokenizer, tokenizer.byte_lengths()


def _encode(block: EncodeTask) -> None:
    """Encode one block to its file: separator and tokens of each document, and how many they are."""
    if block.path.is_file():
        return
    tokenizer, lengths = _tokenizer(block.tokenizer, block.fingerprint)
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array(tokenizer.separator, dtype=dtype)
    parts, counts = list[np.ndarray](), list[int]()
    texts = [*_texts(block)]
    for start in range(0, len(texts), 256):
        chunks = [[[*chunked(text)] for text in document] for document in texts[start : start + 256]]
        encoded = iter(tokenizer.encode_batch([chunk for document in chunks for text in document for chunk in text]))
        for document in chunks:
            ids = [piece for text in document for piece in (separator, *(np.array(next(encoded), dtype=dtype) for _ in text))]
            parts += ids
            counts.append(sum(map(len, ids)))
    tokens = np.concatenate(parts)
    if int(lengths[tokens].sum()) != int(block.documents.size.sum()):
        raise DataError("The tokenizer does not keep every byte of these documents: use a byte-level one.")
    buffer = io.BytesIO()
    np.savez(buffer, tokens=tokens, counts=np.array(counts, dtype=np.int64))
    write_whole(block.path, buffer.getvalue())


def _texts(block: EncodeTask) -> Iterator[list[str]]:
    """The texts of each document: one, or those that are ranked."""
    contents = block.documents.contents(block.work)
    if not block.ranked:
        yield from ([content.decode()] for content in contents)
        return
    for content, targets in zip(contents, block.documents.targets(block.work), strict=True):
        ends = np.cumsum(targets.get(block.ranked, [len(content)])).tolist()
        yield [content[start:stop].decode() for start, stop in pairwise([0, *ends])]


def chunked(text: str) -> Iterator[str]:
    """A long text in pieces of about CHUNK characters, because the tokenizer's memory is many times that of its text.

    Pieces end between a letter or digit and a line end, where byte-level BPE always cuts, so that the tokens are the same.
    """
    start = 0
    while len(text) - start > 2 * CHUNK:
        found = WORD_END.search(text, start + CHUNK, start + 2 * CHUNK)
        stop = found.start() if found else start + CHUNK
        yield text[start:stop]
        start = stop
    yield text[start:]


@dataclass(frozen=True)
class EncodedSplit:
    """One finished split: its report, the sha256 of its tokens, and the number of tokens of each document."""

    report: SplitReport
    sha256: str
    counts: np.ndarray

    @property
    def hashes(self) -> tuple[str, ...]:
        """What names the content: of tokens, document borders and targets."""
        return self.sha256, *self.report.content_hashes


def write_split(split: str, documents: DocumentTable, blocks: list[Path], out: Path, shard_tokens: int) -> EncodedSplit:
    """Join the blocks into shards of exactly `shard_tokens` tokens (the last one shorter) and write the document offsets."""
    counts: list[np.ndarray] = []
    return write_shards(split, _regroup(blocks, shard_tokens, counts), counts, int(documents.size.sum()), out)


def write_shards(split: str, arrays: Iterable[np.ndarray], counts: list[np.ndarray], num_bytes: int, out: Path) -> EncodedSplit:
    """Write each array of tokens as a shard, and the document offsets. counts: tokens of each document, complete when `arrays` ends."""
    digest, shards = hashlib.sha256(), []
    for number, tokens in enumerate(arrays):
        path = out / f"{split}-{number:05d}.bin"
        write_shard(path, tokens)
        digest.update(tokens.tobytes())
        shards.append(ShardReport(file=path.name, tokens=len(tokens), sha256=sha256_of(path)))
    lengths = np.concatenate(counts)
    path = out / f"{split}-documents.npy"
    with whole_file(path) as file:
        np.save(file, np.concatenate([[0], np.cumsum(lengths)]))
    report = SplitReport(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        bytes=num_bytes,
        shards=tuple(shards),
        offsets_sha256=sha256_of(path),
    )
    return EncodedSplit(report, digest.hexdigest(), lengths)


def add_targets(
    split: str,
    encoded: EncodedSplit,
    documents: DocumentTable,
    work: Path,
    out: Path,
    tokenizer: Tokenizer,
    reports: Mapping[str, TargetReport],
) -> EncodedSplit:
    """Write the targets of a finished split beside its tokens; returns the split with their hashes."""
    if not reports:
        return encoded
    tokens = TokenArray([open_shard(out / shard.file) for shard in encoded.report.shards])
    ends = np.cumsum(encoded.counts).tolist()
    texts = (tokens.read(start, stop) for start, stop in pairwise([0, *ends]))
    hashes = {}
    for name, values in encode_targets(reports, documents.targets(work), texts, tokenizer.byte_lengths()).items():
        path = out / target_file(split, name)
        with whole_file(path) as file:
            np.save(file, values)
        hashes[name] = sha256_of(path)
    return replace(encoded, report=encoded.report.model_copy(update={"targets": hashes}))


def _regroup(blocks: list[Path], size: int, counts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks' tokens in arrays of `size`; collects the documents' token counts on the way."""
    held: list[np.ndarray] = []
    have = 0
    for path in blocks:
        with np.load(path) as block:
            tokens = block["tokens"]
            counts.append(block["counts"])
        while have + len(tokens) >= size:
            yield np.concatenate([*held, tokens[: size - have]])
            tokens, held, have = tokens[size - have :], [], 0
        held.append(tokens)
        have += len(tokens)
    if have:
        yield np.concatenate(held)


def write_text(documents: DocumentTable, work: Path, path: Path) -> None:
    """The documents' UTF-8 bytes one after the other, nothing between them."""
    with whole_file(path) as file:
        file.writelines(documents.contents(work))
