"""Does a corpus folder still hold what its manifest says, byte for byte?"""

from __future__ import annotations

import hashlib
from pathlib import Path

from andromeda.data.corpus import Corpus, open_corpus
from andromeda.data.encode import sha256_of
from andromeda.data.manifest import HELD_OUT_TEXT, Manifest, fingerprint
from andromeda.utils.errors import DataError


def verify(folder: Path) -> Manifest:
    """Hash everything again and decode the held-out split. Raises DataError naming the first file that differs."""
    manifest = Manifest.load(folder)
    content: dict[str, tuple[str, str]] = {}
    for split, report in manifest.splits.items():
        corpus = open_corpus(folder, split)
        for shard in report.shards:
            _expect(folder / shard.file, shard.sha256)
        _expect(folder / f"{split}-documents.npy", report.offsets_sha256)
        content[split] = (_tokens_sha256(corpus), report.offsets_sha256)
        _refuse_other_bytes(folder, split, corpus, report.bytes)
    tokenizer = corpus.tokenizer.fingerprint if corpus.tokenizer else ""
    if fingerprint(tokenizer, content) != manifest.fingerprint:
        raise DataError(f"The fingerprint in the manifest of {folder} is not that of what the folder holds: build the corpus again.")
    return manifest


def _expect(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise DataError(f"{path} does not match its sha256 in the manifest: it was changed or damaged; build the corpus again.")


def _blocks(corpus: Corpus, size: int = 1 << 22) -> list[tuple[int, int]]:
    return [(start, min(start + size, corpus.texts.tokens.size)) for start in range(0, corpus.texts.tokens.size, size)]


def _tokens_sha256(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for start, stop in _blocks(corpus):
        digest.update(corpus.texts.tokens.read(start, stop).astype(corpus.texts.tokens.dtype).tobytes())
    return digest.hexdigest()


def _refuse_other_bytes(folder: Path, split: str, corpus: Corpus, expected: int) -> None:
    """Tokens must stand for the number of bytes reported, and the held-out ones for the held-out text."""
    tokenizer, tokens = corpus.tokenizer, corpus.texts.tokens
    assert tokenizer is not None
    lengths = tokenizer.byte_lengths()
    if sum(int(lengths[tokens.read(a, b)].sum()) for a, b in _blocks(corpus)) != expected:
        raise DataError(f"The {split} tokens of {folder} do not stand for the {expected} bytes reported: build the corpus again.")
    if split == "val":
        content = b"".join(tokenizer.decode_bytes(tokens.read(a, b).tolist()) for a, b in _blocks(corpus))
        if not (folder / HELD_OUT_TEXT).is_file() or (folder / HELD_OUT_TEXT).read_bytes() != content:
            raise DataError(f"{folder / HELD_OUT_TEXT} is not the text of the held-out tokens: build the corpus again.")
