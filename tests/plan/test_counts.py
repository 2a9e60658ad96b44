"""Planned parameters and state against built models, published counts and closed forms."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import torch

from andromeda.config.load import from_values, load
from andromeda.config.run import RunConfig
from andromeda.config.train import CheckpointConfig
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.optim import build_optimizer
from andromeda.plan.estimate import count_parameters
from andromeda.plan.memory import cache_bytes, checkpoint_size, state_bytes
from andromeda.train.callbacks.ema import build_ema

pytestmark = pytest.mark.usefixtures("still_heap")

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "max_seq_len": 32,
    "hidden_size": 64,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "rotary": {"kind": "rope"},
    "feedforward": {"kind": "gelu", "intermediate_size": 128},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"feedforward": {"kind": "swiglu", "bias": True}, "head": {"bias": True}},
    "tied": {"head": {"tied": True}},
    "factorized": {"embedding": {"kind": "factorized", "rank": 16, "absolute": True}},
    "moe": {"feedforward": {"kind": "moe", "intermediate_size": 96}, "experts": {"num_experts": 5, "top_k": 2, "num_shared_experts": 1}},
    "speedrun": {"value_embedding": {"kind": "layered"}, "skips": {"first": True, "unet": True}, "shift": {"kind": "smear"}},
}


def tiny(train: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    return from_values({"model": TINY | changes, "train": train or {}})


def peer(name: str) -> RunConfig:
    return load(str(files("andromeda.plan") / "peers" / f"{name}.toml"))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_a_built_model(name: str) -> None:
    config = tiny(**VARIANTS[name]).model
    built = {id(p): p.numel() for p in Transformer(config).parameters()}
    assert count_parameters(meta_model(config)).total == sum(built.values())


def test_published_counts() -> None:
    """LLaMA's are those of its published weights; GPT-3's is its architecture written out, 174.6 B (the paper says 175.0)."""
    assert count_parameters(meta_model(peer("llama-7b").model)).total == 6_738_415_616
    assert count_parameters(meta_model(peer("llama-65b").model)).total == 65_285_660_672
    C, L, V, T = 12288, 96, 50257, 2048
    norms = (2 * L + 1) * C  # ours have no biases
    assert count_parameters(meta_model(peer("gpt3-175b").model)).total == L * (12 * C * C + 9 * C) + (V + T) * C + norms


def test_active_parameters() -> None:
    """A row of each table; the whole of a table that is the head; of 4 experts the 2 that are chosen."""
    speedrun = load("speedrun").model
    parameters = count_parameters(meta_model(speedrun))
    assert parameters.parts["value embedding"] == 12 * 768 * 50304
    assert parameters.total - parameters.active == (12 * 768 + 768) * (50304 - 1)
    tied = count_parameters(meta_model(tiny(head={"tied": True}).model))
    assert tied.active == tied.total
    moe = count_parameters(meta_model(tiny(**VARIANTS["moe"]).model))
    assert moe.total - moe.active == 255 * 64 + 2 * 3 * (3 * 64 * 96)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("name", ["plain", "tied", "moe", "speedrun"])
def test_state_is_what_a_step_leaves_behind(name: str, kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    config = tiny({"optim": {"kind": kind}, "ema": 0.9}, **VARIANTS[name])
    model = Transformer(config.model)
    optimizer = build_optimizer(model, config.train.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    planned = state_bytes(meta_model(config.model), config.train)
    assert planned.weights == held([*model.parameters(), *model.buffers()])
    assert planned.gradients == held([p.grad for p in model.parameters()])
    assert planned.optimizer == held(optimizer.state_tensors().values())
    assert (ema := build_ema(model, config.train.ema)) is not None
    assert planned.average == held(ema.state_tensors().values())
    saved = checkpoint_size(planned, CheckpointConfig(keep=2))
    assert saved.disk == planned.total - planned.gradients
    assert saved.disk_peak == 3 * saved.disk
    assert saved.host == max(planned.weights, planned.optimizer, planned.average)
    assert checkpoint_size(planned, CheckpointConfig(background=True)).host == saved.disk


def held(tensors: Any) -> int:
    """Bytes of the storages behind some tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_cache_is_what_decoding_holds() -> None:
    config = tiny().model
    cache, model = DynamicKVCache(capacity=24), Transformer(config).bfloat16()
    with torch.no_grad():
        model(torch.zeros(1, 24, dtype=torch.long), cache=cache)
    assert cache_bytes(config, 24) == cache.bytes()


def test_published_cache_sizes() -> None:
    """16 KiB, 512 KiB and 4.5 MiB a token: 2 L G D numbers of two bytes."""
    assert cache_bytes(load("andromeda").model) == 16 << 10
    assert cache_bytes(peer("llama-7b").model) == 512 << 10
    assert cache_bytes(peer("gpt3-175b").model) == 4.5 * (1 << 20)
