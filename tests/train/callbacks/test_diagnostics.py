"""Health figures against hand-made ones, and that watching changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.model.attention import Attention
from andromeda.model.transformer import Transformer
from andromeda.train.callbacks.diagnostics import Diagnostics
from andromeda.train.objective import MicroBatch
from andromeda.train.precision import build_precision
from andromeda.train.trainer import train

IDS = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("qk_norm", ["none", "l2_dim_scale", "rms"])
def test_figures(tiny: Callable[..., RunConfig], qk_norm: str) -> None:
    """Activations from block to block; no logit is above its bound, and with a single pair of heads and tokens it is reached."""
    config = tiny(model__attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "qk_norm": qk_norm}, model__rotary={"kind": "none"})
    model = Transformer(config.model)
    health = Diagnostics(model, build_precision("fp32", torch.device("cpu")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with health.measure(MicroBatch(IDS, IDS, None)), torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
        model.head.weight[:] = before["head.weight"] * 0.5

    logits: list[torch.Tensor] = []
    largest: list[torch.Tensor] = []
    for block in model.decoder.blocks:
        block.register_forward_hook(lambda _, __, x: largest.append(x.abs().max()))
    for module in model.modules():
        if isinstance(module, Attention):
            module.qk_norm.register_forward_hook(
                lambda _, __, qk, scale=module.scale: logits.append(scale * torch.einsum("bthd,bsgd->bthgs", *qk).abs().max())
            )
    with torch.no_grad():
        model.hidden(IDS)
    figures = health.metrics
    assert figures["activation_max"] == pytest.approx(float(max(largest)), rel=1e-6)
    bound = figures["attention_logit_bound"]
    assert float(max(logits)) <= bound * 1.000001
    if qk_norm == "rms":
        assert bound == pytest.approx(16**0.5, rel=1e-4)
    for role, ratio in (("embedding", 0.01), ("matrix", 0.01), ("scalar", 0.01), ("head", 0.5)):
        if f"update_ratio/{role}" in figures:
            assert figures[f"update_ratio/{role}"] == pytest.approx(ratio, rel=1e-3)
    assert {"update_ratio/matrix", "update_ratio/head", "update_ratio/embedding"} <= figures.keys()


def test_watching_changes_nothing(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    metrics: Callable[[Path], list[dict[str, Any]]],
    final_tensors: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """Health figures and probes at every step, and a run without them: the same weights, bit by bit, also with a mixture."""
    mixture = {
        "model__feedforward": {"kind": "moe", "mlp_ratio": 1.0},
        "model__experts": {"num_experts": 4, "top_k": 2, "bias_update_rate": 0.1},
    }
    probes = {"every": 2, "samples": 8, "tasks": ["recall"]}
    watched = tiny(train__log={"every": 3, "diagnostics_every": 1}, train__probes=probes, **mixture)
    train(watched, tmp_path / "watched")
    train(tiny(train__eval_every=0, **mixture), tmp_path / "plain")
    a, b = final_tensors(tmp_path / "watched"), final_tensors(tmp_path / "plain")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert sum("activation_max" in line for line in metrics(tmp_path / "watched")) == 12
    assert sum("probe/recall" in line for line in metrics(tmp_path / "watched")) == 6
