"""A tiny run in bytes and conversations to tune it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.config.data import BuildConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.tune.chat_template import ChatTemplate, find_template
from tests.corpora import tiny_run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in the same order in every process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of 64 tokens."""
    place = tmp_path_factory.mktemp("base")
    tiny_run(place, "The cat {i} sat on the mat.\n", "model.max_seq_len=64", "train.precision=fp32", "model.value_embedding.kind=layered")
    return place / "run"


@pytest.fixture(scope="session")
def chat() -> tuple[ChatTemplate, Tokenizer]:
    """The built-in template with a tokenizer of bytes."""
    source, names = find_template("chatml")
    tokenizer = train_tokenizer([], BuildConfig(tokenizer="bytes")).with_chat(source, names)
    return ChatTemplate(source, tokenizer), tokenizer


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty conversations on sums."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    write(path, [sum_record(a, b) for a in range(5) for b in range(6)])
    return path


def sum_record(a: int, b: int) -> dict[str, Any]:
    """A question and its answer."""
    return {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}


def write(path: Path, records: list[Any]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
