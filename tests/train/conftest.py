"""A corpus of a few kilobytes and runs of a few seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from tests.corpora import short_documents

TIMED = ("seconds", "tokens_per_second", "mfu", "memory_gib")
"""Figures that depend on the machine's mood."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in the same order in every process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents in bytes."""
    return short_documents(tmp_path_factory.mktemp("corpus"), 60, validation=0.1)


@pytest.fixture
def tiny(corpus: Path) -> Callable[..., RunConfig]:
    """A configuration of a model of 30 thousand weights; keywords are dotted paths with `__` for the dot."""

    def make(**changes: object) -> RunConfig:
        values: dict[str, object] = {
            "model": {
                "vocab_size": 257,
                "max_seq_len": 32,
                "hidden_size": 32,
                "num_layers": 2,
                "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "qk_norm": "rms"},
                "rotary": {"kind": "rope"},
                "feedforward": {"kind": "relu2", "mlp_ratio": 2.0},
            },
            "data": {"corpus": str(corpus)},
            "train": {
                "steps": 12,
                "batch_size": 4,
                "precision": "fp32",
                "compile": "off",
                "device": "cpu",
                "eval_every": 5,
                "eval_tokens": 256,
                "log": {"every": 3},
                "checkpoints": {"every": 4},
                "optim": {"lr": 3e-3},
            },
        }
        for path, value in changes.items():
            *tables, last = path.split("__")
            table = values
            for name in tables:
                table = table.setdefault(name, {})  # type: ignore[assignment]
            table[last] = value
        return from_values(values)

    return make


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl without what was timed."""
    return _metrics


@pytest.fixture
def final_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of a run's newest checkpoint."""
    return _final_tensors


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Bit-equal tensors and equal figures of two runs."""

    def check(one: Path, other: Path) -> None:
        a, b = _final_tensors(one), _final_tensors(other)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
        assert _metrics(one) == _metrics(other)

    return check


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: figure for name, figure in line.items() if name not in TIMED} for line in lines]


def _final_tensors(run: Path) -> dict[str, Tensor]:
    newest = max((run / "checkpoints").glob("step-*"))
    return {f"{file.stem}:{name}": tensor for file in sorted(newest.glob("*.safetensors")) for name, tensor in load_file(file).items()}
