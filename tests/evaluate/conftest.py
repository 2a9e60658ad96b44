"""A corpus of bytes, a run of two steps, questions; and the command line in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.corpora import tiny_run

SHAPE = ["model.max_seq_len=256", "train.precision=fp32", "train.eval_every=2", "data.document_mask=true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, a run of two steps, questions."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("made")
    tiny_run(place, "the {i}th text of a small corpus, café\n" * 20, *SHAPE)
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
