"""Tensor parallelism against one process in float64: loss, gradients of every parameter, weights after some steps, and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from andromeda.config.model import ModelConfig
from andromeda.generate.decode_step import StaticDecodeStep
from andromeda.generate.engine import Engine
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.feedforward.dense import MLP
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.meta_model import meta_model
from andromeda.model.tensor_plan import has_plan
from andromeda.model.transformer import Transformer
from andromeda.ops.collectives import Group
from andromeda.ops.cross_entropy import VocabularyShard, linear_cross_entropy, reference
from andromeda.parallel import tensor
from andromeda.utils.errors import ConfigError
from tests.parallel.models import batch_of, distance, graphs_of, loss_of, small, weights_of
from tests.parallel.processes import run_processes

HEADS: dict[str, Any] = {"attention__num_heads": 4, "attention__head_dim": 16}
KV_HEADS: dict[str, Any] = {**HEADS, "attention__num_kv_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "andromeda": {**HEADS, "alibi__num_heads": 3, "head__bias": True, "head__softcap": 10.0},
    "folded ALiBi, value embeddings, tied head": {
        "base": "andromeda-tuned",
        "num_layers": 4,
        **KV_HEADS,
        "alibi__num_heads": 3,
        "alibi__fold_into_qk": True,
        "init__kind": "normal",
        "head__tied": True,
    },
    "speedrun": {"base": "speedrun", **KV_HEADS, "attention__sliding_window": 6, "init__kind": "normal", "num_layers": 4},
    "one key/value head, value embeddings, biases": {
        "base": "nano",
        **HEADS,
        "num_layers": 4,
        "init__kind": "normal",
        "feedforward__bias": True,
        "attention__bias": True,
    },
    "like Llama": {
        **KV_HEADS,
        "alibi__num_heads": 0,
        "rotary__kind": "rope",
        "feedforward__kind": "swiglu",
        "feedforward__bias": False,
        "shift__kind": "none",
        "block__norm": "rms",
        "attention__qk_norm": "rms_dim_scale",
    },
    "experts, parallel blocks, heads with and without ALiBi": {
        **KV_HEADS,
        "alibi__num_heads": 2,
        "rotary__heads": "non_alibi",
        "feedforward__kind": "moe",
        "experts__balance": "loss",
        "experts__aux_loss_coef": 0.1,
        "experts__num_experts": 4,
        "experts__num_shared_experts": 1,
        "block__kind": "parallel",
        "feedforward__bias": False,
    },
    "DeepNorm, sigmoid attention, smear, factorized table": {
        **HEADS,
        "alibi__num_heads": 2,
        "block__residual": "deepnorm",
        "attention__mixer": "sigmoid",
        "embedding__kind": "factorized",
        "embedding__rank": 8,
        "shift__kind": "smear",
    },
    "sandwich norms, absolute positions, soft cap": {
        **HEADS,
        "alibi__num_heads": 2,
        "block__residual": "sandwich",
        "attention__qk_norm": "l2_head_scale",
        "embedding__absolute": True,
        "attention__softcap": 20.0,
        "shift__kind": "lerp",
    },
}
STEPS = 2


def gradients_of(model: Transformer) -> dict[str, Tensor]:
    """Whole gradients by name; zeros where there is none."""
    found = {}
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[f"gradient of {name}"] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def train(model: Transformer, steps: int) -> dict[str, Tensor]:
    """Everything that must be equal."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(model.config, 2, 24, documents=True, seed=step))
        loss.backward()
        if step == 0:
            found |= gradients_of(model)
        optimizer.step()
        found[f"loss {step}"] = loss.detach()
    with torch.no_grad():
        found["logits"] = model(batch_of(model.config, 2, 24, documents=False, seed=9).ids)
    return found | weights_of(model)


def compare(mesh: DeviceMesh, config: ModelConfig) -> dict[str, float]:
    """Relative differences of a parallel model from one process's."""
    ours = train(tensor.parallelize(Transformer(config, seed=3).double(), mesh), STEPS)
    expected = train(Transformer(config, seed=3).double(), STEPS)
    assert ours.keys() == expected.keys()
    return {key: distance(ours[key], expected[key]) for key in expected}


@torch.no_grad()
def compare_generation(mesh: DeviceMesh, config: ModelConfig) -> dict[str, float]:
    """Text and logits of a model split for inference, as it is and with fused layers, also with a cache of fixed size."""
    prompt = batch_of(config, 1, 9, documents=False).ids
    one = Transformer(config, seed=3).double().eval()
    expected, logits = Engine(one).generate([prompt[0].tolist()], max_new_tokens=8, temperature=0.0), one(prompt)
    found = {}
    for fused in (False, True):
        model = tensor.parallelize(Transformer(config, seed=3).double().eval(), mesh, inference=True)
        if fused:
            optimize_for_inference(model, compile=False)
        ours = Engine(model).generate([prompt[0].tolist()], max_new_tokens=8, temperature=0.0)
        assert ours[0].ids == expected[0].ids
        found[f"logits, fused {fused}"] = distance(model(prompt), logits)
        found[f"step, fused {fused}"] = distance(_last_by_step(model, prompt), logits[:, -1])
    return found


def _last_by_step(model: Transformer, ids: Tensor) -> Tensor:
    """Logits of the last position, by a decoding step with a cache of fixed size."""
    cache = DynamicKVCache()
    model.hidden(ids[:, :-1], cache=cache)

    def read(ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        logits: Tensor = model.head(model.hidden(ids, documents=documents, cache=cache)[:, -1])
        return logits

    return StaticDecodeStep(read, cache, most=4)(ids[:, -1])


def compare_compiled(mesh: DeviceMesh, config: ModelConfig) -> dict[str, float]:
    """Both layers are one graph."""
    model = tensor.parallelize(Transformer(config, seed=3).double(), mesh)
    graphs, difference = graphs_of(model, lambda: loss_of(model, batch_of(config, 2, 24, documents=True)))
    return {"graphs besides one": graphs - 1, "loss": difference}


def compare_loss(mesh: DeviceMesh) -> dict[str, float]:
    """The loss of a vocabulary in pieces against all logits at once."""
    group = Group.of(mesh)
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((40, 8), (24, 8), (24,)))
    targets = torch.randint(24, (40,), generator=rng).masked_fill(torch.arange(40) % 7 == 0, -100)
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    options: dict[str, Any] = {"softcap": 3.0, "z_loss": 0.1}
    expected = reference(whole[0], whole[1], targets, bias=whole[2], **options)
    expected.total.backward()
    pieces = [x.clone().requires_grad_(), *(t.chunk(group.size)[group.rank].clone().requires_grad_() for t in (weight, bias))]
    ours = linear_cross_entropy(pieces[0], pieces[1], targets, bias=pieces[2], chunk=16, shard=VocabularyShard(group), **options)
    ours.total.backward()
    found = {"total": distance(ours.total, expected.total), "nll": distance(ours.nll, expected.nll)}
    for name, piece, full in zip(("x", "weight", "bias"), pieces, whole, strict=True):
        assert piece.grad is not None
        assert full.grad is not None
        found[name] = distance(piece.grad, full.grad if name == "x" else full.grad.chunk(group.size)[group.rank])
    return found


def work(configs: dict[str, ModelConfig]) -> dict[str, dict[str, float]]:
    """On each process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {name: compare(mesh, config) | compare_generation(mesh, config) for name, config in configs.items()}
    return found | {"loss": compare_loss(mesh), "compiled": compare_compiled(mesh, next(iter(configs.values())))}


@pytest.fixture(scope="module")
def differences() -> list[dict[str, dict[str, float]]]:
    return run_processes(2, work, {name: small(**changes) for name, changes in MODELS.items()})


@pytest.mark.parametrize("name", [*MODELS, "loss", "compiled"])
def test_two_processes_compute_what_one_does(differences: list[dict[str, dict[str, float]]], name: str) -> None:
    for found in differences:
        worst = max(found[name], key=lambda key: found[name][key])
        assert found[name][worst] < 1e-9, worst


@pytest.mark.slow
def test_four_processes_compute_what_one_does() -> None:
    for found in run_processes(4, work, {name: small(**changes) for name, changes in MODELS.items()}):
        assert max(value for values in found.values() for value in values.values()) < 1e-9


@pytest.mark.parametrize(
    ("changes", "count", "named"),
    [
        ({"attention__num_heads": 3}, 2, "model.attention.num_heads"),
        ({"attention__num_heads": 4, "attention__num_kv_heads": 2}, 4, "model.attention.num_kv_heads"),
        ({"attention__num_heads": 6, "feedforward__intermediate_size": 40}, 3, "inner features"),
        ({"base": "nano", "attention__num_heads": 3, "feedforward__intermediate_size": 48, "num_layers": 4}, 3, "vocab_size"),
    ],
)
def test_sizes_that_cannot_be_split_are_named(changes: dict[str, Any], count: int, named: str) -> None:
    model = meta_model(small(**{"alibi__num_heads": 0, **changes}))
    with pytest.raises(ConfigError, match=named):
        tensor.plan(model, count)


def test_a_part_that_computes_something_else_has_no_plan() -> None:
    class Doubled(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert has_plan(MLP(8, 16, "gelu", bias=True))
    assert not has_plan(Doubled(8, 16, "gelu", bias=True))
