"""A corpus of a few kilobytes in bytes, for tests of what is done with one."""

from __future__ import annotations

import random
from pathlib import Path

from andromeda.config.data import BuildConfig
from andromeda.data.build import build

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "one", "red", "bird", "came", "to", "see", "it")


def short_documents(place: Path, count: int, validation: float) -> Path:
    """`count` documents of sixty random words each, written and built under the empty folder `place`; returns the corpus."""
    texts, draw = place / "texts", random.Random(0)
    texts.mkdir()
    for number in range(count):
        (texts / f"{number:02}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + f" {number}.\n")
    build([str(texts)], place / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=validation))
    return place / "corpus"
