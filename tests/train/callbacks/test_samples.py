"""Samples during training: the text that `generate` writes from the same checkpoint, and no effect on what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from andromeda import Andromeda
from andromeda.config.run import RunConfig
from andromeda.report.run_data import read_samples
from andromeda.train import trainer
from andromeda.train.trainer import train
from andromeda.utils.errors import ConfigError

Tiny = Callable[..., RunConfig]
SAMPLES = {"every": 4, "prompts": ["the cat", ""], "max_new_tokens": 12}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples" / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_of_generate(tiny: Tiny, tmp_path: Path, temperature: float) -> None:
    """From the checkpoint of each step, with the same seed."""
    config = tiny(seed=3, train__samples=SAMPLES | {"temperature": temperature}, train__checkpoints={"every": 4, "keep": 9})
    train(config, tmp_path / "run")
    found = lines(tmp_path / "run")
    assert [(line["step"], line["prompt"]) for line in found] == [(step, prompt) for step in (4, 8, 12) for prompt in ("the cat", "")]
    for line in found:
        model = Andromeda.from_run(tmp_path / "run", device="cpu", step=line["step"])
        expected = model.generate(line["prompt"], max_new_tokens=12, temperature=temperature, top_k=0, seed=3)
        assert line["text"] == expected
        assert (line["seed"], line["temperature"]) == (3, temperature)
    assert [sample.step for sample in read_samples(tmp_path / "run" / "samples")] == [12, 12, 8, 8, 4, 4]


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {
            "model__feedforward": {"kind": "moe", "mlp_ratio": 1.0},
            "model__experts": {"num_experts": 4, "top_k": 2, "bias_update_rate": 0.1},
        },
    ],
)
def test_what_is_learned_does_not_depend_on_them(
    tiny: Tiny, tmp_path: Path, assert_same_run: Callable[[Path, Path], None], parts: dict[str, object]
) -> None:
    train(tiny(**parts), tmp_path / "without")
    train(tiny(train__samples=SAMPLES, **parts), tmp_path / "with")
    assert_same_run(tmp_path / "without", tmp_path / "with")


def test_an_interrupted_run_ends_with_the_same_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train__samples=SAMPLES | {"every": 3})
    train(config, tmp_path / "whole")
    real = trainer.Trainer._train_step

    def killed(self: trainer.Trainer) -> None:
        if self._state.progress.step == 7:  # samples of step 6 are written, and the newest checkpoint is that of step 4
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halves")
    monkeypatch.setattr(trainer.Trainer, "_train_step", real)
    train(config, tmp_path / "halves", resume=True)
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")


def test_texts_beyond_the_context(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="texts of 40 tokens"):
        train(tiny(train__samples=SAMPLES | {"max_new_tokens": 32}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
