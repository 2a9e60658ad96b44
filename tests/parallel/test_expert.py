"""Expert parallelism against one process in float64, each process with sequences of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from andromeda.config.model import ModelConfig
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.parallel import expert
from andromeda.utils.errors import ConfigError
from tests.parallel.models import batch_of, distance, loss_of, set_step_load, small
from tests.parallel.processes import run_processes

MOE: dict[str, Any] = {
    "attention__num_heads": 4,
    "attention__head_dim": 16,
    "alibi__num_heads": 0,
    "feedforward__kind": "moe",
    "feedforward__bias": False,
    "experts__num_experts": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "gated experts, a shared one, auxiliary loss": {
        **MOE,
        "experts__balance": "loss",
        "experts__aux_loss_coef": 0.1,
        "experts__num_shared_experts": 1,
    },
    "one dense expert a token": {
        **MOE,
        "experts__top_k": 1,
        "experts__normalize": False,
        "experts__kind": "relu2",
        "block__kind": "parallel",
    },
}


def gradients(model: Transformer, config: ModelConfig, rank: int) -> dict[str, Tensor]:
    """Of the sequences of one process, added to what is there."""
    loss_of(model, batch_of(config, 2, 24, documents=True, seed=rank)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(mesh: DeviceMesh, config: ModelConfig) -> dict[str, float]:
    """Relative differences of gradients from one process that reads all sequences."""
    one, model = (Transformer(config, seed=3).double() for _ in range(2))
    counted = Transformer(config, seed=3).double()
    for rank in range(mesh.size()):
        gradients(counted, config, rank)
    set_step_load(one, counted)
    set_step_load(model, counted)
    for rank in range(mesh.size()):
        expected = gradients(one, config, rank)
    model = expert.parallelize(model, mesh)
    ours = gradients(model, config, mesh.get_local_rank())
    assert any(isinstance(grad, DTensor) for grad in ours.values())
    found = {}
    for name, grad in ours.items():
        if isinstance(grad, DTensor):
            whole = grad.full_tensor()
        else:
            dist.all_reduce(whole := grad)
        found[name] = distance(whole, expected[name])
    with torch.no_grad():
        ids = batch_of(config, 2, 24, documents=False, seed=mesh.get_local_rank()).ids
        found["logits"] = distance(model.eval()(ids), one.eval()(ids))
    return found


def work(configs: dict[str, ModelConfig]) -> dict[str, dict[str, float]]:
    """On each process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: compare(mesh, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def differences() -> list[dict[str, dict[str, float]]]:
    return run_processes(2, work, {name: small(**changes) for name, changes in MODELS.items()})


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(differences: list[dict[str, dict[str, float]]], name: str) -> None:
    for found in differences:
        worst = max(found[name], key=lambda key: found[name][key])
        assert found[name][worst] < 1e-9, worst


@pytest.mark.slow
def test_four_processes_compute_what_one_does() -> None:
    for found in run_processes(4, work, {name: small(**changes) for name, changes in MODELS.items()}):
        assert max(value for values in found.values() for value in values.values()) < 1e-9


@pytest.mark.parametrize(("changes", "named"), [({**MOE, "experts__num_experts": 3}, "num_experts"), ({"alibi__num_heads": 0}, "has none")])
def test_experts_that_cannot_be_spread_are_named(changes: dict[str, Any], named: str) -> None:
    model = meta_model(small(**changes))
    with pytest.raises(ConfigError, match=named):
        expert.stacks_of_experts(model, 2)
