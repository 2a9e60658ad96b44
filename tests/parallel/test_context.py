"""Context parallelism against one process in float64: hidden states, loss, gradients, and the KV cache after a prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from andromeda.config.model import ModelConfig
from andromeda.generate.optimize import optimize_for_inference
from andromeda.loss import Nebula, next_token
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.parallel import context
from andromeda.train.objective import MicroBatch
from andromeda.utils.errors import ConfigError
from tests.parallel.models import batch_of, distance, graphs_of, set_step_load, small
from tests.parallel.processes import run_processes

HEADS: dict[str, Any] = {"attention__num_heads": 4, "attention__head_dim": 16}
KV_HEADS: dict[str, Any] = {**HEADS, "attention__num_kv_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "andromeda, slopes": {**HEADS, "alibi__num_heads": 3},
    "andromeda, folded ALiBi": {**HEADS, "alibi__num_heads": 3, "alibi__fold_into_qk": True},
    "speedrun": {"base": "speedrun", **KV_HEADS, "attention__sliding_window": 6, "init__kind": "normal", "num_layers": 4},
    "shift by three tokens, window, dynamic NTK": {
        **HEADS,
        "alibi__num_heads": 0,
        "rotary__kind": "rope",
        "rotary__scaling__kind": "dynamic",
        "rotary__scaling__factor": 2.0,
        "shift__tokens": 3,
        "attention__sliding_window": 9,
        "attention__full_attention_interval": 2,
    },
    "smear, absolute positions, sigmoid attention": {
        **HEADS,
        "alibi__num_heads": 2,
        "attention__mixer": "sigmoid",
        "shift__kind": "smear",
        "embedding__absolute": True,
    },
    "experts": {
        **KV_HEADS,
        "alibi__num_heads": 2,
        "feedforward__kind": "moe",
        "feedforward__bias": False,
        "experts__balance": "loss",
        "experts__aux_loss_coef": 0.1,
        "experts__num_experts": 4,
        "shift__kind": "lerp",
    },
}
LENGTH = 32


def loss_and_gradients(model: Transformer, hidden: Tensor, targets: Tensor, count: int) -> dict[str, Tensor]:
    """Sums over this process's targets."""
    batch = MicroBatch(targets, targets, None)
    loss = Nebula([next_token(1e-3)])(model.head, hidden, batch, {"next_token": count}).total
    loss.backward()
    found = {f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return found | {"loss": loss.detach()}


def compare(mesh: DeviceMesh, config: ModelConfig, documents: bool) -> dict[str, float]:
    """Relative differences from one process."""
    batch = batch_of(config, 2, LENGTH, documents)
    count = int((batch.targets != -100).sum())
    model = Transformer(config, seed=3).double()
    hidden = model.hidden(batch.ids, documents=batch.documents)
    expected = loss_and_gradients(model, hidden, batch.targets, count)
    split = Transformer(config, seed=3).double()
    parallel = context.parallelize(split, mesh)
    set_step_load(split, model)
    mine = parallel.hidden(batch.ids, documents=batch.documents)
    ours = loss_and_gradients(split, mine, parallel.split(batch.targets), count)
    for value in ours.values():
        dist.all_reduce(value)
    found = {key: distance(ours[key], expected[key]) for key in expected}
    return found | {"hidden": distance(parallel.join(mine), hidden), "last": distance(mine_last(parallel, batch), hidden[:, -1:])}


def mine_last(parallel: context.ContextParallel, batch: MicroBatch) -> Tensor:
    """The last hidden state."""
    with torch.no_grad():
        return parallel.last_hidden(batch.ids, documents=batch.documents)


@torch.no_grad()
def compare_prefill(mesh: DeviceMesh, config: ModelConfig, fused: bool) -> dict[str, float]:
    """Two chunks of a prompt read by all processes and one more token by each, against one process."""
    ids = batch_of(config, 2, LENGTH + 9, documents=False).ids
    model = Transformer(config, seed=3).double().eval()
    expected = model.hidden(ids, span=64)
    parallel, cache = context.parallelize(model, mesh), DynamicKVCache()
    if fused:
        optimize_for_inference(model, compile=False)
    parallel.hidden(ids[:, :16], cache=cache, span=64)
    second = parallel.last_hidden(ids[:, 16:LENGTH], cache=cache, span=64)
    after = model.hidden(ids[:, LENGTH:], cache=cache, span=64)
    return {"prompt": distance(second, expected[:, LENGTH - 1 : LENGTH]), "after": distance(after, expected[:, LENGTH:])}


def compare_compiled(mesh: DeviceMesh, config: ModelConfig) -> dict[str, float]:
    """Both layers are one graph."""
    model = Transformer(config, seed=3).double()
    parallel, batch = context.parallelize(model, mesh), batch_of(config, 2, LENGTH, documents=True)
    graphs, difference = graphs_of(model, lambda: parallel.hidden(batch.ids, documents=batch.documents))
    return {"graphs besides one": graphs - 1, "hidden": difference}


def work(configs: dict[str, ModelConfig]) -> dict[str, dict[str, float]]:
    """On each process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, config in configs.items():
        found[name] = compare(mesh, config, documents=False)
        found[f"{name}, documents"] = compare(mesh, config, documents=True)
        found[f"{name}, prefill"] = compare_prefill(mesh, config, fused=False)
        found[f"{name}, fused prefill"] = compare_prefill(mesh, config, fused=True)
    return found | {"compiled": compare_compiled(mesh, next(iter(configs.values())))}


@pytest.fixture(scope="module")
def differences() -> list[dict[str, dict[str, float]]]:
    return run_processes(2, work, {name: small(**changes) for name, changes in MODELS.items()})


@pytest.mark.parametrize("kind", ["", ", documents", ", prefill", ", fused prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(differences: list[dict[str, dict[str, float]]], name: str, kind: str) -> None:
    for found in differences:
        worst = max(found[name + kind], key=lambda key: found[name + kind][key])
        assert found[name + kind][worst] < 1e-9, worst


def test_both_layers_are_compiled_as_one_graph(differences: list[dict[str, dict[str, float]]]) -> None:
    for found in differences:
        assert max(found["compiled"].values()) < 1e-9, found["compiled"]


@pytest.mark.slow
def test_four_processes_compute_what_one_does() -> None:
    several = {name: small(**changes) for name, changes in MODELS.items() if "three tokens" not in name}
    for found in run_processes(4, work, several):
        assert max(value for values in found.values() for value in values.values()) < 1e-9


def test_sequences_that_cannot_be_split_are_refused() -> None:
    config = small(**HEADS, alibi__num_heads=0, shift__tokens=3)
    with pytest.raises(ConfigError, match="4 chunks"):
        context.check_length(config, 30, 2)
    with pytest.raises(ConfigError, match="token shift"):
        context.check_length(config, 8, 2)


def test_a_mixer_that_does_not_say_it_can_is_refused() -> None:
    model = meta_model(small(**HEADS, alibi__num_heads=0))
    model.decoder.blocks[0].attention = torch.nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="Identity"):
        context.check_mixers(model, 2)
