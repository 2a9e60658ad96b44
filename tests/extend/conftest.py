"""A corpus of a few kilobytes in bytes, and a run of a few steps on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.train.trainer import train
from tests.corpora import short_documents


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in the same order in every process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents in bytes."""
    return short_documents(tmp_path_factory.mktemp("corpus"), 40, validation=0.2)


Make = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def make(corpus: Path) -> Make:
    """A configuration of a model of 12 thousand weights; keywords change its [model] table."""

    def configuration(**model: object) -> RunConfig:
        values = {
            "name": "old",
            "model": {
                "vocab_size": 257,
                "max_seq_len": 32,
                "hidden_size": 16,
                "num_layers": 2,
                "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
                "rotary": {"kind": "rope"},
                "feedforward": {"kind": "relu2", "mlp_ratio": 2.0},
                **model,
            },
            "data": {"corpus": str(corpus)},
            "train": {
                "steps": 6,
                "batch_size": 4,
                "precision": "fp32",
                "compile": "off",
                "device": "cpu",
                "eval_every": 0,
                "ema": 0.5,
                "checkpoints": {"every": 0},
                "optim": {"lr": 3e-3},
            },
        }
        return from_values(values)

    return configuration


@pytest.fixture(scope="session")
def old(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a moving average of its weights."""
    out = tmp_path_factory.mktemp("runs") / "old"
    train(make(), out)
    return out
