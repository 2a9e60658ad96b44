"""The sentence at the end of a training, against entropies in closed form and runs that learn nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.data.loader import Batch, TokenStream
from andromeda.report.build_report import build_report
from andromeda.report.run_card import MARK, write_run_card
from andromeda.train.outcome import explain_poor_loss, unigram_entropy
from andromeda.train.progress import NullReporter
from andromeda.train.trainer import train

Tiny = Callable[..., RunConfig]


class Drawn(TokenStream):
    """Independent tokens of known probabilities."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self._p, self._random = probabilities, np.random.default_rng(0)

    def gather(self, numbers: range) -> Batch:  # type: ignore[override]
        targets = torch.from_numpy(self._random.choice(len(self._p), size=(len(numbers), 64), p=self._p))
        targets[:, 0] = -100
        return Batch(targets, targets, targets, 0, 0)


@pytest.mark.parametrize("size", [7, 4096])
def test_entropy_of_a_known_distribution(size: int) -> None:
    """Also of a large vocabulary, where the plain estimate would be 0.03 nats too low."""
    weights = 1.0 / np.arange(1, size + 1) ** 0.3
    probabilities = weights / weights.sum()
    exact = float(-(probabilities * np.log(probabilities)).sum())
    assert unigram_entropy(Drawn(probabilities), 64) == pytest.approx(exact, abs=0.012)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3.0, ""),
        (3.95, ""),
        (4.05, "no better than that of knowing how often each token occurs"),
        (math.log(512), "that of guessing all 512 tokens alike"),
        (math.log(512) - 0.06, "that of guessing all 512 tokens alike"),
        (math.nan, "is not finite"),
        (9.0, "worse than that of guessing all 512 tokens alike"),
        (None, "all were skipped"),
    ],
)
def test_sentences(loss: float | None, message: str) -> None:
    sentence = explain_poor_loss(loss, 4.0, 512, 1e9)
    assert message in sentence
    assert bool(sentence) == bool(message)
    assert not message or "1e+09" in sentence


class Told(NullReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(("lr", "message"), [(1e-9, "guessing all 257 tokens alike"), (10.0, "is worse than"), (1e9, "is not finite")])
def test_a_learning_rate_that_does_not_learn_is_told(tiny: Tiny, tmp_path: Path, lr: float, message: str) -> None:
    """On the screen, in metrics.jsonl, in the report and on the card."""
    bad = Told()
    config = tiny(train__optim={"lr": lr}, train__steps=20, train__spike_guard={"enabled": False})
    train(config, tmp_path / "bad", reporter=bad)
    last = [json.loads(line) for line in (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines() if "warning" in line][-1]
    assert bad.messages[-1] == last["warning"]
    assert message in last["warning"]
    assert f"{lr:g}" in last["warning"]
    assert last["step"] == 20
    assert "without learning" in build_report(tmp_path / "bad")
    assert write_run_card(tmp_path / "bad") == tmp_path / "bad" / "README.md"
    assert "without learning" in (tmp_path / "bad" / "README.md").read_text()


def test_a_run_that_learns_is_told_nothing(tiny: Tiny, tmp_path: Path) -> None:
    good = Told()
    train(tiny(train__optim={"lr": 1e-2}, train__steps=60, train__batch_size=16), tmp_path / "good", reporter=good)
    assert not [text for text in good.messages if "loss" in text]
    assert "without learning" not in build_report(tmp_path / "good")


def test_a_readme_of_ones_own_stays(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(train__steps=1), tmp_path / "run")
    assert write_run_card(tmp_path / "run")
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.startswith(MARK)
    assert "andromeda generate" in text
    (tmp_path / "run" / "README.md").write_text("mine")
    assert write_run_card(tmp_path / "run") is None
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
