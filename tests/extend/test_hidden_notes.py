"""Notes in a text: a reader of the plain text answers every question, and the scorer agrees with whoever answers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from andromeda.config.data import BuildConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.evaluate import hidden_notes
from andromeda.train.precision import build_precision
from andromeda.utils.errors import DataError

TEXTS = [" ".join(f"{a}{b}{c}" for a in "bdklm" for b in "aeiou" for c in "nrstxyz")] * 4


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One that spells words, one for which they are single tokens."""
    if request.param == "bytes":
        return train_tokenizer([], BuildConfig(tokenizer="bytes"))
    letters = "bcdfghjklmnp"
    words = [f" {a}{b}{c}" for a in letters for b in "aeiou" for c in letters]
    return train_tokenizer(["".join(words[i:] + words[:i]) for i in range(0, 40)], BuildConfig(vocab_size=1000))


@pytest.fixture
def text(tokenizer: Tokenizer) -> np.ndarray:
    """A haystack."""
    return np.array(tokenizer.encode("x = 1\nif x:\n    y = x\n" * 200), dtype=np.int64)


def solve(whole: str) -> dict[str, str]:
    """The value of each key that is noted once, read by a person's means."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"\n# note( \w+ \w+)( \w+ \w+)\n", whole.replace("\n", "\n\n")):
        found.setdefault(key, value)
    return found


def test_a_reader_answers_every_question(tokenizer: Tokenizer, text: np.ndarray) -> None:
    task = hidden_notes.question_sequences(tokenizer, text, 700, 5, 3, seed=1)
    assert task.ids.shape == (3, 700)
    for ids, answers in zip(task.ids, task.answers, strict=True):
        begin = int(answers.min()) - 20
        notes = solve(tokenizer.decode(ids[: min(begin, 700)].tolist()))
        assert len(notes) >= 4
        for answer in answers:
            at = int(answer[0])
            asked = re.findall(r"# note( \w+ \w+)$", tokenizer.decode(ids[:at].tolist()))
            said = tokenizer.decode(ids[answer].tolist())
            everything = solve(tokenizer.decode(ids[:at].tolist()))
            assert everything[asked[0]] == said


def test_notes_lie_at_their_depths(tokenizer: Tokenizer, text: np.ndarray) -> None:
    task = hidden_notes.question_sequences(tokenizer, text, 900, 4, 2, seed=1)
    for ids, answers in zip(task.ids, task.answers, strict=True):
        space = int(answers.min())
        for depth, answer in zip(task.depths.tolist(), answers, strict=True):
            value = ids[answer].tolist()
            first = next(i for i in range(900) if ids[i : i + len(value)].tolist() == value)
            assert first / space == pytest.approx(depth, abs=0.2)


def test_rows_for_training_are_documents_of_their_length(tokenizer: Tokenizer, text: np.ndarray) -> None:
    rows = hidden_notes.training_sequences(tokenizer, text, 600, 4, 3, seed=0)
    assert rows.shape == (3, 600)
    assert (rows == tokenizer.eos).sum() == 3
    assert (rows[:, 0] == tokenizer.eos).all()
    again = hidden_notes.training_sequences(tokenizer, text, 600, 4, 2, seed=0)
    assert (again == rows[:2]).all()


def test_the_scorer_believes_nobody_but_the_right(tokenizer: Tokenizer, text: np.ndarray) -> None:
    task = hidden_notes.question_sequences(tokenizer, text, 700, 5, 2, seed=1)
    ids = task.ids.clone()
    precision = build_precision("fp32", torch.device("cpu"))
    model = SimpleNamespace(
        eval=lambda: None,
        hidden=lambda seen: _following(seen, ids),
        head=lambda h: torch.nn.functional.one_hot(h[..., 0], 5000),
    )
    assert hidden_notes.score_notes(model, task, precision, 2).all()  # type: ignore[arg-type]
    ids[0, task.answers[0, 3, 0]] += 1
    right = hidden_notes.score_notes(model, task, precision, 2)  # type: ignore[arg-type]
    assert right.sum() == 9
    assert not right[0, 3]
    found = hidden_notes.notes_result({700: right}, task.depths)
    assert found["accuracy"] == [[1.0, 1.0, 1.0, 0.5, 1.0]]


def _following(seen: Tensor, known: Tensor) -> Tensor:
    """Hidden states that name the next token of the known rows."""
    return known.roll(-1, 1)[: len(seen), :, None]


def test_too_many_notes_are_refused(tokenizer: Tokenizer, text: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fit into 60 tokens"):
        hidden_notes.question_sequences(tokenizer, text, 60, 5, 1, seed=1)
