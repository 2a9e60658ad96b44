"""Planned bytes against those that real processes exchange over gloo, and against the simulation of the first of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.model.meta_model import meta_model
from andromeda.parallel.layout import Layout
from andromeda.parallel.mesh import build_mesh
from andromeda.parallel.ring import COLLECTIVES
from andromeda.parallel.traffic import TrafficCounter
from andromeda.plan.communication import in_layout, traffic
from andromeda.plan.memory import state_bytes
from andromeda.plan.simulation import simulate_step
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state
from andromeda.train.step import StepBatch, TrainStep
from tests.train.ranks import on_ranks

TOLERANCE = 0.002
"""Norms of gradients, the sums of loss and a few numbers more are not planned."""
SMALL = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.vocab_size": 512,
    "model.attention.num_heads": 4,
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 16,
    "model.max_seq_len": 64,
    "model.value_embedding.kind": "none",
    "model.shift.kind": "none",
    "train.batch_size": 8,
    "train.micro_batch_size": 1,
    "train.optim.kind": "adamw",
    "train.precision": "bf16",
    "train.compile": "off",
    "train.device": "cpu",
    "train.spike_guard.enabled": "false",
}
MOE = {"model.feedforward.kind": "moe", "model.experts.num_experts": 4, "model.experts.top_k": 2, "model.experts.balance": "bias"}
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "shard": (Layout(shard=4), {}),
    "kept": (Layout(shard=4), {"parallel.reshard_after_forward": "never"}),
    "replicate and shard": (Layout(replicate=2, shard=2), {"train.activation_checkpointing": "full"}),
    "replicate": (Layout(replicate=4), {}),
    "tensor": (Layout(tensor=2, replicate=2), {"train.activation_checkpointing": "full"}),
    "tensor and shard": (Layout(tensor=2, shard=2), {"model.block.kind": "parallel"}),
    "context": (Layout(context=2, shard=2), {"train.activation_checkpointing": "full"}),
    "expert": (Layout(shard=4, expert=2), MOE),
}


def config_of(name: str) -> RunConfig:
    layout, changes = CASES[name]
    return in_layout(load("nano", [f"{key}={value}" for key, value in (SMALL | changes).items()]), layout)


def planned(name: str) -> dict[str, float]:
    config = config_of(name)
    return traffic(config, CASES[name][0], meta_model(config.model), 2, memory=0)


def step_and_compare(rank: int, names: list[str]) -> None:
    """One step on this process of each layout; what all send together is the plan's of one, times their number."""
    for name in names:
        config, layout = config_of(name), CASES[name][0]
        state = build_train_state(config, torch.device("cpu"), "", build_mesh(layout, torch.device("cpu")))
        step = TrainStep(state, NextTokenObjective(state.model, 0.0, state.collectives), config.train)
        draw = torch.Generator().manual_seed(rank // (layout.context * layout.tensor))
        ids = torch.randint(0, 512, (8 // layout.data, 64), generator=draw)
        with TrafficCounter() as counter:
            step(StepBatch(MicroBatch(ids, ids, None), 8 * 64, (0, 8)))
        sent = torch.tensor([float(counter.bytes[kind]) for kind in COLLECTIVES])
        dist.all_reduce(sent)
        found = dict(zip(COLLECTIVES, (sent / 4).tolist(), strict=True))
        for kind, expected in planned(name).items():
            # Where tokens go depends on the router: on the average over processes, as if evenly.
            tolerance = 0.15 if kind == "all-to-all" else TOLERANCE
            assert found[kind] == pytest.approx(expected, rel=tolerance), (name, kind)
        rest = sum(found.values()) - sum(found[kind] for kind in planned(name))
        assert rest <= 0.01 * sum(found.values()), (name, found)


def test_plan_is_what_processes_send() -> None:
    on_ranks(4, step_and_compare, list(CASES))


@pytest.mark.parametrize("name", ["shard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor and shard", "context"))])
def test_simulation_sends_what_is_planned(name: str) -> None:
    config, layout = config_of(name), CASES[name][0]
    step = simulate_step(config, layout, "bf16", memory=0.0, gpu=True)
    for kind, expected in planned(name).items():
        assert step.sent[kind] == pytest.approx(expected, rel=0.01)
    assert step.within_host == step.total_sent, "four devices are on one host"


def test_simulated_state_is_a_share_of_the_whole() -> None:
    config, layout = config_of("shard"), CASES["shard"][0]
    whole = state_bytes(meta_model(config.model), config.train)
    step = simulate_step(config, layout, "bf16", memory=0.0, gpu=True)
    assert step.state == pytest.approx((whole.weights + whole.optimizer) / 4, rel=0.01)
    assert step.peak > step.state + whole.gradients / 4
