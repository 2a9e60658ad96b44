"""torch.compile per block: one graph without a break, and one compiled block for all layers that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer
from tests.conformance.covering import CHOICES, DEFAULTS, model_config

OUTSIDE = ("scaling", "scale", "bias", "embedding", "head", "init")
"""Slots that change numbers or what lies outside of the blocks, not what a block calls."""
ALONE = [next(iter(DEFAULTS.items())), *(c for c in CHOICES if c[1] != DEFAULTS[c[0]] and c[0] not in OUTSIDE)]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(model: Transformer) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


def graphs(model: Transformer, documents: torch.Tensor | None = None, backend: str = "eager") -> int:
    """Graphs that a forward and backward pass compiles; a break inside a block is an error. The outcome is that of eager mode."""
    expected = model(ids(model), documents=documents)
    counter = CompileCounterWithBackend(backend)
    for block in model.decoder.blocks:
        block.compile(fullgraph=True, backend=counter)
    found = model(ids(model), documents=documents)
    found.float().square().mean().backward()
    assert torch.equal(found, expected)
    return counter.frame_count


@pytest.mark.parametrize(("slot", "value"), ALONE)
def test_a_block_is_one_graph_for_all_layers(slot: str, value: str) -> None:
    # Grouped matmuls are one kernel in bfloat16 alone.
    model = Transformer(model_config({slot: value})).to(torch.bfloat16 if value.startswith("moe") else torch.float32)
    assert graphs(model) == (2 if value in ("window-global", "local-full", "linear-full") else 1)


@pytest.mark.parametrize(("skips", "count"), [({"first": True, "unet": True}, 2), ({"first": True, "unet": False}, 1), ({}, 0)])
def test_mixes_between_blocks_are_one_graph_for_all_layers(skips: dict[str, bool], count: int) -> None:
    config = model_config({})
    model = Transformer(config.model_copy(update={"num_layers": 6, "skips": config.skips.model_copy(update=skips)})).double()
    expected = model(ids(model))
    grads = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    counter = CompileCounterWithBackend("aot_eager")
    model.decoder.compile_mixes(fullgraph=True, backend=counter)
    found = model(ids(model))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.square().mean(), list(model.parameters())), grads, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == count


def test_a_recomputed_block_of_experts_is_one_graph_too() -> None:
    model = Transformer(model_config({"feedforward": "moe-shared"})).bfloat16()
    for block in model.decoder.blocks:
        block.forward = recomputed(block.forward)
    assert graphs(model, backend="aot_eager") == 1
    router = model.decoder.blocks[0].feedforward.router
    assert int(router.load.sum()) % (24 * router.active) == 0


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return run


def small(preset: str) -> ModelConfig:
    """A preset with twelve layers, more than torch compiles of one function before it gives up."""
    sizes = [
        "vocab_size=64",
        "max_seq_len=64",
        "hidden_size=48",
        "num_layers=12",
        "attention.num_heads=4",
        "attention.head_dim=16",
        "feedforward.intermediate_size=32",
    ]
    changes = [f"model.{size}" for size in sizes] + (["model.alibi.num_heads=2"] if preset == "andromeda" else [])
    if preset == "speedrun":
        changes += [
            "model.attention.num_kv_heads=4",
            "model.attention.sliding_window=8",
            "train.window.end=8",
            "train.window.start=4",
            "train.seq_len=64",
        ]
    return load(preset, changes).model


@pytest.mark.parametrize("preset", ["andromeda", "speedrun", "andromeda-125m"])
@pytest.mark.parametrize("packed", [False, True])
def test_presets_compile_once_however_deep(preset: str, packed: bool) -> None:
    model = Transformer(small(preset))
    assert len(model.decoder.blocks) == 12
    documents = torch.arange(12)[None].expand(2, -1) // 5 if packed else None
    assert graphs(model, documents) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["andromeda", "speedrun"])
def test_inductor_agrees(preset: str) -> None:
    model = Transformer(small(preset))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = model(ids(model))
    for block in model.decoder.blocks:
        block.compile(fullgraph=True)
    torch.testing.assert_close(model(ids(model)), expected, rtol=1e-4, atol=1e-4)
