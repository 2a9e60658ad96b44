"""The optimizer of a run: what it computes, and that saving it loses nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from andromeda.config.train import OptimizerConfig
from andromeda.optim import OptimizerContainer, adamw_8bit, build_optimizer
from andromeda.utils.errors import CheckpointError, MissingExtra

KINDS = ["adamw", "adamw8bit", "muon"]


class Tiny(nn.Module):
    """Wide enough that its matrices are quantized (64 x 64 = 4096 elements)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(64, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3), nn.Linear(3, 64)])
        self.head = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks[:2]:
            x = x + block(x).relu()
        return self.head(x + self.blocks[3](self.blocks[2](x)))


def train(model: Tiny, optimizer: OptimizerContainer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        ids = torch.randint(64, (4, 8), generator=generator)
        optimizer.set_lr_factor(1.0 / (step + 1), step)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_bytes(optimizer: OptimizerContainer, shuffle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State as a checkpoint keeps it: safetensors and JSON, optionally with all keys in another order."""
    tensors = load(save({name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()}))
    values = json.loads(json.dumps(optimizer.state_metadata()))
    if shuffle:
        keys = list(tensors)
        random.Random(0).shuffle(keys)
        tensors = {key: tensors[key] for key in keys}
        values["entries"] = dict(reversed(values["entries"].items()))
    return tensors, values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str, shuffle: bool) -> None:
    config = OptimizerConfig.model_validate({"kind": kind, "lr": 0.01})
    whole = Tiny()
    straight = build_optimizer(whole, config)
    train(whole, straight, 3)
    resumed = copy.deepcopy(whole)
    optimizer = build_optimizer(resumed, config)
    tensors, values = through_bytes(straight, shuffle)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.load_state(tensors, values)
    for name, tensor in straight.state_tensors().items():
        assert torch.equal(tensor, optimizer.state_tensors()[name]), name
    assert optimizer.state_metadata() == straight.state_metadata()
    train(whole, straight, 2, seed=1)
    train(resumed, optimizer, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items()), "loading must copy"


def test_adamw_equals_torch_with_decay_on_matrices_only() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer = build_optimizer(ours, OptimizerConfig(kind="adamw", lr=0.01, weight_decay=0.5, embedding_lr=0.02))
    decayed = [block.weight for block in theirs.blocks]
    others = [p for name, p in theirs.named_parameters() if p.ndim < 2 or name == "head.weight"]
    reference = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.5},
            {"params": others, "weight_decay": 0.0},
            {"params": [theirs.embedding.weight], "weight_decay": 0.0, "lr": 0.02},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for seed in range(3):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_eight_bit_keeps_embeddings_and_small_tensors_in_32_bits() -> None:
    model = Tiny()
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw8bit"))
    train(model, optimizer, 1)
    tensors = optimizer.state_tensors()
    quantized = {name.split("/")[0] for name in tensors if name.endswith("/codes")}
    assert quantized == {"blocks.0.weight", "blocks.1.weight", "head.weight"}
    assert tensors["blocks.0.weight/exp_avg/codes"].dtype == torch.uint8
    assert tensors["embedding.weight/exp_avg"].dtype == torch.float32


def test_eight_bit_stays_near_32_bits() -> None:
    """From one start on equal gradients the two differ by rounding of the moments, well below what either moved."""
    start, wide, narrow = Tiny(), Tiny(), Tiny()
    for kind, model in (("adamw", wide), ("adamw8bit", narrow)):
        optimizer = build_optimizer(model, OptimizerConfig.model_validate({"kind": kind, "lr": 0.01, "weight_decay": 0.0}))
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    before, after, eight = (model.get_parameter("blocks.0.weight") for model in (start, wide, narrow))
    moved, apart = (after - before).norm(), (after - eight).norm()
    assert 0 < apart / moved < 0.05


@pytest.mark.parametrize(
    ("compile", "elements", "compiler", "compiled"),
    [
        ("off", 1, "g++", False),
        ("on", 1 << 40, None, True),
        ("auto", 1 << 40, "g++", False),
        ("auto", 1, None, False),
        ("auto", 1, "g++", True),
    ],
)
def test_eight_bit_compiles_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, compile: Any, elements: int, compiler: str | None, compiled: bool
) -> None:
    """What is asked for, and of itself only with enough elements and a compiler: seen by the stance of its step."""
    stances: list[str] = []

    def watched(stance: str) -> contextlib.AbstractContextManager[None]:
        stances.append(stance)
        return contextlib.nullcontext()

    monkeypatch.setattr(adamw_8bit, "MIN_COMPILED", elements)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    model = Tiny()
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw8bit"), compile)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "set_stance", watched)
    train(model, optimizer, 1)
    assert stances == ([] if compiled else ["force_eager"])


def test_eight_bit_without_torchao_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MissingExtra, match=r"pip install 'andromeda\[eightbit\]'"):
        build_optimizer(Tiny(), OptimizerConfig(kind="adamw8bit"))


def test_muon_updates_matrices_and_adamw_the_rest() -> None:
    optimizer = build_optimizer(Tiny(), OptimizerConfig(kind="muon", lr=0.05))
    muon, adamw = optimizer.optimizers
    assert sorted(tuple(p.shape) for p in muon.param_groups[0]["params"]) == [(3, 64), (64, 3), (64, 64), (64, 64)]
    assert {group["role"] for group in adamw.param_groups} == {"embedding", "head", "scalar"}
    assert optimizer.learning_rates() == {"matrix": 0.05, "embedding": 0.3, "head": 0.004, "scalar": 0.04}
    explicit = build_optimizer(Tiny(), OptimizerConfig(kind="muon", embedding_lr=0.6, head_lr=0.008, scalar_lr=0.01))
    assert explicit.learning_rates() == {"matrix": 3e-4, "embedding": 0.6, "head": 0.008, "scalar": 0.01}


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_reaches_every_group(kind: str) -> None:
    optimizer = build_optimizer(Tiny(), OptimizerConfig.model_validate({"kind": kind, "lr": 0.5}))
    base = optimizer.learning_rates()
    for factor in (0.25, 1.0, 0.0):
        optimizer.set_lr_factor(factor, 0)
        assert optimizer.learning_rates() == pytest.approx({role: rate * factor for role, rate in base.items()})


def test_the_momentum_warms_up_linearly() -> None:
    optimizer = build_optimizer(Tiny(), OptimizerConfig(kind="muon", momentum_start=0.85, momentum=0.95, momentum_warmup=300))
    for step, expected in ((0, 0.85), (150, 0.9), (300, 0.95), (9999, 0.95)):
        optimizer.set_lr_factor(1.0, step)
        assert optimizer.optimizers[0].param_groups[0]["momentum"] == pytest.approx(expected)


def test_state_before_the_first_step_is_empty_and_loads() -> None:
    optimizer = build_optimizer(Tiny(), OptimizerConfig())
    assert optimizer.state_tensors() == {}
    build_optimizer(Tiny(), OptimizerConfig()).load_state({}, json.loads(json.dumps(optimizer.state_metadata())))


def test_wrong_state_is_refused_and_changes_nothing() -> None:
    model = Tiny()
    optimizer = build_optimizer(model, OptimizerConfig())
    train(model, optimizer, 1)
    tensors, values = through_bytes(optimizer, shuffle=False)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    last = max(tensors)
    with pytest.raises(CheckpointError, match=f"lacks the optimizer tensor {last}"):
        optimizer.load_state({name: tensor + 1 for name, tensor in tensors.items() if name != last}, values)
    for entry, wrong in (("exp_avg", torch.zeros(())), ("exp_avg_sq", torch.zeros(2)), ("step", torch.zeros(64))):
        with pytest.raises(CheckpointError, match="has the shape"):
            optimizer.load_state({**tensors, f"head.weight/{entry}": wrong}, values)
    with pytest.raises(CheckpointError, match="optimizer is 'muon'"):
        optimizer.load_state(tensors, {**values, "kind": "muon"})
    with pytest.raises(CheckpointError, match=r"another model: a\.stranger"):
        optimizer.load_state(tensors, {**values, "parameters": ["a.stranger", *values["parameters"]]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())
