"""Tokenizers compared on the same held-out bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from andromeda.data.corpus import HELD_OUT_TEXT, open_corpus
from andromeda.utils.errors import DataError


@dataclass(frozen=True)
class TokenizerStats:
    """One tokenizer measured on a held-out text; separators do not count."""

    folder: str
    kind: str
    vocab_size: int
    bytes_per_token: float
    tokens_per_word: float
    """Fertility (Rust et al. 2021, arXiv:2012.15613), words being what stands between white space."""
    used: float
    """Share of the vocabulary that occurs in the text."""


def compare(folders: Sequence[Path]) -> list[TokenizerStats]:
    """Measure the tokenizers of corpora that were built from the same documents. Raises DataError when the texts differ."""
    text = _held_out(folders[0])
    for folder in folders[1:]:
        if _held_out(folder) != text:
            raise DataError(f"{folder} and {folders[0]} hold out different texts: build one with the other as its source.")
    return [_measure(folder, text) for folder in folders]


def _held_out(folder: Path) -> bytes:
    try:
        return (folder / HELD_OUT_TEXT).read_bytes()
    except OSError as error:
        raise DataError(f"{folder} has no held-out text ({error.strerror}): name a corpus folder.") from error


def _measure(folder: Path, text: bytes) -> TokenizerStats:
    corpus = open_corpus(folder, "val")
    tokenizer, tokens = corpus.tokenizer, corpus.documents.tokens
    assert tokenizer is not None
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, tokens.size, 1 << 22):
        counts += np.bincount(tokens.read(start, min(start + (1 << 22), tokens.size)), minlength=tokenizer.vocab_size)
    total = int(counts.sum() - counts[tokenizer.eos])
    return TokenizerStats(
        folder=str(folder),
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=len(text) / total,
        tokens_per_word=total / max(len(text.decode().split()), 1),
        used=float((counts > 0).mean()),
    )
