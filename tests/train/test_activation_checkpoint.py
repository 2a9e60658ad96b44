"""Activation checkpointing and compilation change neither the loss nor any gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.model.transformer import Transformer
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.compile import compile_blocks


def gradients(config: RunConfig, prepare: Callable[[Transformer], object]) -> dict[str, Tensor]:
    model = Transformer(config.model, seed=3).double()
    prepare(model)
    ids = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(32).expand(2, -1) // 11
    model(ids, documents=documents).logsumexp(-1).sum().backward()
    routed = {name: buffer for name, buffer in model.named_buffers() if name.endswith("load")}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | routed


MODELS = {
    "serial": {},
    "parallel": {"model__block": {"kind": "parallel"}, "model__skips": {"first": True, "unet": True}},
    "moe": {
        "model__feedforward": {"kind": "moe", "mlp_ratio": 1.0},
        "model__experts": {"num_experts": 4, "top_k": 2, "balance": "loss", "aux_loss_coef": 0.1},
        "model__value_embedding": {"kind": "layered"},
    },
}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_keeps_gradients(tiny: Callable[..., RunConfig], name: str, kind: str) -> None:
    config = tiny(**MODELS[name])
    plain = gradients(config, lambda model: None)
    again = gradients(config, lambda model: checkpoint_blocks(model, kind))
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        if key.endswith("load"):
            # Recomputed activations are counted twice; the bias only follows which experts are above the mean.
            assert torch.equal(again[key], 2 * gradient)
        else:
            torch.testing.assert_close(again[key], gradient, rtol=1e-12, atol=1e-14)


def test_what_is_computed_twice(tiny: Callable[..., RunConfig]) -> None:
    """Only `full` repeats matmuls: in two layers query, key, value, out and the feed-forward's first; nothing needs its last again."""
    from torch.utils.flop_counter import FlopCounterMode

    def matmul_flops(kind: str) -> int:
        model = Transformer(tiny().model)
        checkpoint_blocks(model, kind)
        out = model(torch.zeros(1, 8, dtype=torch.long)).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    T, C, inner = 8, 32, 64
    assert matmul_flops("selective") == matmul_flops("none")
    assert matmul_flops("full") - matmul_flops("none") == 2 * 2 * T * C * (32 + 16 + 16 + 32 + inner)


@pytest.mark.slow
def test_compiled_blocks_keep_gradients(tiny: Callable[..., RunConfig]) -> None:
    config = tiny(train__compile="on")
    plain = gradients(config, lambda model: None)
    for kind in ("none", "selective", "full"):

        def prepare(model: Transformer, kind: str = kind) -> None:
            checkpoint_blocks(model, kind)
            assert compile_blocks(model, config, torch.device("cpu"))

        for key, gradient in gradients(config, prepare).items():
            torch.testing.assert_close(gradient, plain[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_checkpointed_blocks_are_still_compiled(tiny: Callable[..., RunConfig], kind: str) -> None:
    """torch.compile passes over what it does not understand without a word; so the graphs are counted."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = Transformer(tiny().model)
    checkpoint_blocks(model, kind)
    for block in model.decoder.blocks:
        block.compile(backend=backend)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert graphs
