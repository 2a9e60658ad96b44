"""Lion, an optimizer in one file of examples/: its update, training and resuming through the command line, the plan, wrong keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from andromeda.config.load import load
from andromeda.config.train import OptimizerConfig
from andromeda.model.meta_model import meta_model
from andromeda.optim import build_optimizer, optimizer_state_bytes
from andromeda.plan.memory import update_bytes
from andromeda.train.trainer import train
from andromeda.utils.errors import ConfigError
from tests.command import call
from tests.corpora import short_documents

EXAMPLES = Path(__file__).parents[2] / "examples"
KIND = "add_an_optimizer:Lion"


@pytest.fixture(autouse=True)
def from_the_examples_folder(monkeypatch: pytest.MonkeyPatch, allow_code: None) -> Iterator[None]:
    """Where a user would start it."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])
    yield
    sys.modules.pop("add_an_optimizer", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_documents(tmp_path_factory.mktemp("corpus"), 60, validation=0.1)


def changes(corpus: Path, steps: int) -> list[str]:
    model = ["vocab_size=257", "max_seq_len=32", "hidden_size=32", "num_layers=2"]
    attention = ["num_heads=2", "num_kv_heads=1", "head_dim=16"]
    run = [f"steps={steps}", "batch_size=4", "precision=fp32", "compile=off", "device=cpu", "eval_every=0", "log.every=1"]
    run += [
        "optim.lr=1e-3",
        f"optim.kind={KIND}",
        "optim.options.betas=[0.95, 0.98]",
        "schedule.warmup=0",
        "schedule.cooldown=0",
        "schedule.kind=constant",
    ]
    return [
        f"data.corpus={corpus}",
        *(f"model.{key}" for key in model),
        *(f"model.attention.{key}" for key in attention),
        *(f"train.{key}" for key in run),
    ]


def test_the_update_is_that_of_the_paper() -> None:
    """Against the algorithm written out in float64, with decay on the matrix and none on the bias."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    config = OptimizerConfig(kind=KIND, lr=0.01, weight_decay=0.5, options={"betas": [0.9, 0.99]})
    optimizer = build_optimizer(model, config)
    expected = {name: (p.detach().clone(), torch.zeros_like(p), 0.5 * (p.ndim > 1)) for name, p in model.named_parameters()}
    for _ in range(5):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            w, m, decay = expected[name]
            update = torch.sign(0.9 * m + 0.1 * p.grad) + decay * w
            expected[name] = (w - 0.01 * update, 0.99 * m + 0.01 * p.grad, decay)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name][0], rtol=1e-12, atol=1e-14)


def test_a_run_learns_resumes_bit_for_bit_and_is_reported(corpus: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert call("train", "nano", *changes(corpus, 8), "--out", str(whole)) == 0
    config = load("nano", changes(corpus, 8))

    class StopAfterFour:
        def log(self, step: int, metrics: dict[str, object]) -> None:
            if step == 4:
                raise KeyboardInterrupt

        def message(self, text: str) -> None: ...
        def step_done(self, step: int) -> None: ...
        def close(self) -> None: ...

    every = config.model_copy(update={"train": config.train.model_copy(update={"checkpoints": type(config.train.checkpoints)(every=3)})})
    with pytest.raises(KeyboardInterrupt):
        train(every, halves, reporter=StopAfterFour())
    assert call("train", "nano", *changes(corpus, 8), "--out", str(halves), "--resume") == 0
    for part in ("model", "optimizer"):
        one, other = (load_file(run / "checkpoints" / "step-00000008" / f"{part}.safetensors") for run in (whole, halves))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0]
    assert "Lion" in (whole / "report.html").read_text()


def test_the_plan_counts_one_momentum(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load("nano", changes(corpus, 8))
    model = meta_model(config.model)
    largest = max(p.numel() for p in model.parameters())
    assert optimizer_state_bytes(model, config.train.optim) == 4 * sum(p.numel() for p in model.parameters())
    assert 4 * largest <= update_bytes(model, config.train.optim, gpu=False) <= 12 * largest
    assert update_bytes(model, config.train.optim, gpu=True) == update_bytes(model, config.train.optim, gpu=False)
    assert call("plan", "nano", *changes(corpus, 8), "--details") == 0
    assert KIND in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"options": {"beta": [0.9, 0.99]}},
            r"there is no key train\.optim\.options\.beta \(did you mean train\.optim\.options\.betas\?\)",
        ),
        ({"kind": "add_an_optimizer:Lyon"}, "cannot be imported"),
        ({"kind": "collections:Counter"}, "derive the class from"),
        ({"kind": "adamw", "options": {"betas": [0.9, 0.99]}}, "no effect with kind 'adamw'"),
    ],
)
def test_wrong_keys_are_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_optimizer(nn.Linear(3, 2), OptimizerConfig.model_validate({"kind": KIND} | change))
