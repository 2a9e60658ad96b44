"""The vocabulary size of a run that leaves it open: that of its corpus."""

from __future__ import annotations

import math
from pathlib import Path

from andromeda.config.data import DataConfig
from andromeda.utils.untrusted import read_json_object

MANIFEST = "manifest.json"
VOCAB_SIZE_NAMES = frozenset({"vocab_size", "num_tokens"})
"""Keys of a [model] table that give it."""
MULTIPLE = 128
"""Vocabularies are padded at most to multiples of this, which keeps the head's matmul on tensor cores."""


def padded(entries: int, preset: int) -> int:
    """`entries` rounded up to the largest power of two, at most 128, that the preset's vocabulary size is a multiple of."""
    multiple = math.gcd(preset, MULTIPLE)
    return -(-entries // multiple) * multiple


def corpus_vocab_size(data: DataConfig) -> int | None:
    """Entries of the tokenizer of the run's corpora (the most of any, though all must share one), from their manifests.

    None where no corpus says it: whoever opens the corpus for training refuses a damaged one in a sentence of its own.
    """
    folders = [data.corpus] if data.corpus else [source.path for source in data.sources]
    return max(filter(None, map(_entries, folders)), default=None)


def _entries(folder: str) -> int | None:
    try:
        entries = read_json_object(Path(folder) / MANIFEST)["tokenizer"]["vocab_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return entries if type(entries) is int and entries > 0 else None
