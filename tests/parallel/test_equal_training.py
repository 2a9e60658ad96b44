"""Training on several processes learns what one process learns: loss, weights, optimizer state and metrics, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.train import checkpoint
from andromeda.train.metrics import TIMING_METRICS
from tests.parallel.whole_runs import train_on

TOLERANCE = 1e-9
LLAMA = {"model__attention__qk_norm": "none", "model__feedforward__kind": "swiglu", "model__block__norm": "rms", "model__head__tied": True}
ANDROMEDA = {
    "model__attention__qk_norm": "l2_dim_scale",
    "model__alibi__num_heads": 1,
    "model__rotary__kind": "xpos",
    "model__shift__kind": "chunks",
    "model__shift__tokens": 1,
    "model__block__norm": "layer",
    "model__feedforward__kind": "gelu",
    "model__feedforward__bias": True,
}
SPEEDRUN = {
    "model__embedding__norm": True,
    "model__attention__num_kv_heads": 2,
    "model__block__norm": "rms_plain",
    "model__value_embedding__kind": "layered",
    "model__value_embedding__init": 0.5,
    "model__skips__first": True,
    "model__skips__unet": True,
    "model__head__softcap": 30.0,
    "data__document_mask": True,
    "model__init__kind": "zero_projections",
}
MOE = {
    "model__feedforward__kind": "moe",
    "model__experts__num_experts": 4,
    "model__experts__top_k": 2,
    "model__experts__num_shared_experts": 1,
    "model__experts__balance": "bias",
}
MODELS = {"andromeda": ANDROMEDA, "speedrun": SPEEDRUN, "llama": LLAMA, "moe": MOE}
LAYOUTS = {
    "replicate": (2, {"parallel__replicate": -1, "parallel__shard": 1}),
    "shard": (2, {}),
    "shard4": (4, {}),
    "both": (4, {"parallel__replicate": 2, "parallel__shard": 2}),
    "tensor": (2, {"parallel__tensor": 2}),
    "tensor and shard": (4, {"parallel__tensor": 2, "parallel__shard": 2}),
    "context": (2, {"parallel__context": 2}),
    "context and tensor": (4, {"parallel__context": 2, "parallel__tensor": 2}),
    "context and shard": (4, {"parallel__context": 2, "parallel__shard": 2}),
    "expert": (2, {"parallel__expert": 2}),
    "expert and shard": (4, {"parallel__shard": 4, "parallel__expert": 2}),
}
QUICK = {
    ("andromeda", "adamw", "shard"),
    ("speedrun", "muon", "both"),
    ("moe", "muon", "shard"),
    ("llama", "muon", "replicate"),
    ("andromeda", "muon", "tensor"),
    ("speedrun", "adamw", "context"),
    ("moe", "muon", "expert"),
}


def state_of(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint but the random states."""
    newest = checkpoint.list_all(run / "checkpoints")[0]
    parts = checkpoint.read(newest).tensors
    return {f"{part}:{name}": held[name] for part, held in parts.items() if part != "random" for name in held}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_METRICS} for line in lines]


def assert_equal_runs(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * a[name].abs().max().clamp(min=1e-3), name
    for line, same in zip(metrics_of(one), metrics_of(other), strict=True):
        assert _texts(same) == _texts(line)
        assert _numbers(same) == pytest.approx(_numbers(line), rel=tolerance)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _texts(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not isinstance(value, int | float)}


CASES = [
    pytest.param(model, optimizer, layout, marks=() if (model, optimizer, layout) in QUICK else pytest.mark.slow)
    for model in MODELS
    for optimizer in ("adamw", "muon")
    for layout in LAYOUTS
    if model == "moe" or "expert" not in layout
]


@pytest.mark.parametrize(("model", "optimizer", "layout"), CASES)
def test_any_layout_learns_the_same(tiny: Callable[..., RunConfig], tmp_path: Path, model: str, optimizer: str, layout: str) -> None:
    size, changes = LAYOUTS[layout]
    common: dict[str, Any] = {
        "model__vocab_size": 260,
        "train__steps": 20,
        "train__micro_batch_size": 1,
        "train__eval_every": 10,
        "train__optim__kind": optimizer,
        "train__log__diagnostics_every": 10,
        "train__samples__every": 20,
        "train__samples__max_new_tokens": 8,
        "train__checkpoints__every": 0,
        **MODELS[model],
    }
    train_on(0, tiny(**common), tmp_path / "one")
    train_on(size, tiny(**common, **changes), tmp_path / "several")
    assert_equal_runs(tmp_path / "one", tmp_path / "several")
    written = [(tmp_path / run / "samples" / "training.jsonl").read_text() for run in ("one", "several")]
    assert written[0] == written[1]


def test_default_dtype_reaches_the_weights(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The comparison is in float64 indeed."""
    train_on(2, tiny(train__steps=1), tmp_path / "run")
    assert {tensor.dtype for name, tensor in state_of(tmp_path / "run").items() if name.startswith("model:")} == {torch.float64}
