"""The example of one model with three tasks, at a size of seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from examples import write_tag_score as example


def test_spans_and_score_are_those_of_the_text() -> None:
    """The score from the words alone: what "not" stands before counts the other way around."""
    draw = random.Random(3)
    for _ in range(50):
        review = example.review(draw)
        for start, stop, label in review["tags"]:
            assert review["text"][start:stop] in example.NAMES[label]
        words = review["text"].replace(".", "").split()
        before = [None, *words[:-1]]
        assert review["score"] == sum(example.LIKED.get(w, 0) * (-1 if b == "not" else 1) for b, w in zip(before, words, strict=True))


def test_the_comparison_runs_and_is_repeated_from_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four models, three times the steps for the one with all tasks, every quality measured; a second call trains nothing."""
    torch.set_num_threads(1)
    arguments = ["--out", str(tmp_path), "--steps", "2", "--seeds", "1", "--reviews", "60", "--result", str(tmp_path / "result.json")]
    found = example.main(arguments)
    assert found["training_flops"]["several"] == pytest.approx(sum([found["training_flops"]["single"]] * 3))
    assert set(found["seeds"][0]["several"]) == set(found["seeds"][0]["single"]) == set(example.TASKS)
    assert 0 < found["seeds"][0]["several"]["text"] < 20
    assert example.main(arguments)["seeds"] == found["seeds"] == json.loads((tmp_path / "result.json").read_text())["seeds"]
    assert "of its own model's quality" in capsys.readouterr().out


def test_ratios_are_shares_of_quality() -> None:
    assert example.ratio("text", 2.0, 1.0) == 0.5
    assert example.ratio("tags", 0.9, 0.45) == 2.0
