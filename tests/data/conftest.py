"""Small corpora made of words, so that every figure can be counted by hand in a test."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from andromeda.config.data import BuildConfig
from andromeda.data.build import build

WORDS = ["def", "return", "self", "value", "naïve", "für", "日本", "😀", "x_1", "12345", "  ", "\n    ", "(a, b):\n", "\t", "# note\r\n"]


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Distinct documents of 3 to `longest` words, the same for the same seed."""
    draw = random.Random(seed)
    return [f"# {seed}.{i}\n" + " ".join(draw.choices(WORDS, k=draw.randint(3, longest))) for i in range(count)]


def write_files(folder: Path, documents: list[str], ending: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(documents):
        (folder / f"{i:05d}{ending}").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 300 documents with a trained BPE."""
    root = tmp_path_factory.mktemp("corpus")
    build(
        [str(write_files(root / "raw", texts(300)))], root / "out", BuildConfig(vocab_size=300, validation_fraction=0.1, shard_tokens=4096)
    )
    return root / "out"


@pytest.fixture(scope="session")
def second_corpus(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Other documents with the first corpus's tokenizer."""
    root = tmp_path_factory.mktemp("second")
    config = BuildConfig(tokenizer=str(corpus), validation_fraction=0.1)
    build([str(write_files(root / "raw", texts(120, seed=7, longest=200)))], root / "out", config)
    return root / "out"
