"""Corpora of a few kilobytes in bytes, and a run of two steps on one, for tests of what is done with them."""

from __future__ import annotations

import random
from pathlib import Path

from andromeda.config.data import BuildConfig
from andromeda.data.build import build
from tests.command import call

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "one", "red", "bird", "came", "to", "see", "it")


def short_documents(place: Path, count: int, validation: float) -> Path:
    """`count` documents of sixty random words each, written and built under the empty folder `place`; returns the corpus."""
    texts, draw = place / "texts", random.Random(0)
    texts.mkdir()
    for number in range(count):
        (texts / f"{number:02}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + f" {number}.\n")
    build([str(texts)], place / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=validation))
    return place / "corpus"


TINY_RUN = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.vocab_size=257",
    "model.attention.num_heads=2",
    "model.attention.num_kv_heads=1",
    "model.attention.head_dim=8",
    "train.steps=2",
    "train.batch_size=2",
    "train.schedule.cooldown=1",
    "train.schedule.warmup=0",
    "train.compile=off",
    "train.device=cpu",
]
"""Overrides of preset nano for a run that takes a second."""


def tiny_run(place: Path, text: str, *overrides: str) -> None:
    """A corpus of 40 documents `text` (in which {i} is their number) and a run of two steps, made by the command line under `place`."""
    (place / "texts").mkdir()
    for i in range(40):
        (place / "texts" / f"{i}.txt").write_text(text.format(i=i))
    settings = ["--tokenizer", "bytes", "--validation-fraction", "0.2", "--workers", "1"]
    assert call("data", "build", str(place / "texts"), "--out", str(place / "corpus"), *settings) == 0
    assert call("train", "nano", *TINY_RUN, *overrides, f"data.corpus={place / 'corpus'}", "--out", str(place / "run")) == 0
