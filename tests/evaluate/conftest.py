"""A corpus of bytes, a run of two steps, questions; and the command line in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.command import call

SHAPE = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.max_seq_len=256",
    "model.vocab_size=257",
    "train.steps=2",
    "train.batch_size=2",
]
SHAPE += ["model.attention.num_heads=2", "model.attention.num_kv_heads=1", "model.attention.head_dim=8", "train.schedule.cooldown=1"]
SHAPE += [
    "train.schedule.warmup=0",
    "train.compile=off",
    "train.device=cpu",
    "train.precision=fp32",
    "train.eval_every=2",
    "data.document_mask=true",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, a run of two steps, questions."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("made")
    texts = place / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"the {i}th text of a small corpus, café\n" * 20)
    assert (
        call(
            "data",
            "build",
            str(texts),
            "--out",
            str(place / "corpus"),
            "--tokenizer",
            "bytes",
            "--validation-fraction",
            "0.2",
            "--workers",
            "1",
        )
        == 0
    )
    assert call("train", "nano", *SHAPE, f"data.corpus={place / 'corpus'}", "--out", str(place / "run")) == 0
    (place / "some.txt").write_text("Text of another kind, für sich.\n" * 40)
    choices = [{"question": f"{i}?", "choices": ["yes", "no", "perhaps"], "answer": i % 3} for i in range(7)]
    (place / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    solved = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    (place / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    for name in ("corpus", "some.txt", "choices.jsonl", "solved.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
