"""Shrunk models and plain training loops, to compare parallel training with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.loss import Nebula, next_token
from andromeda.model.feedforward.moe import Router
from andromeda.model.transformer import Transformer
from andromeda.train.objective import MicroBatch

SMALL: dict[str, Any] = {"vocab_size": 64, "max_seq_len": 64, "hidden_size": 16, "num_layers": 2, "alibi__fold_into_qk": False}
"""Sizes of every model here; heads and techniques are each model's own."""


def small(base: str = "andromeda", **changes: Any) -> ModelConfig:
    """The preset `base` with SMALL sizes and `changes` of the model by dotted key, with `__` for the dots."""
    overrides = [f"model.{key.replace('__', '.')}={_written(value)}" for key, value in (SMALL | changes).items()]
    window = changes.get("attention__sliding_window", 0)
    return load(base, [*overrides, "train.seq_len=0", f"train.window.end={window}", f"train.window.start={min(1, window)}"]).model


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def batch_of(config: ModelConfig, rows: int, length: int, documents: bool, seed: int = 0) -> MicroBatch:
    """Random tokens, the first targets of each sequence masked; documents of uneven lengths."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=rng)
    targets = ids[:, 1:].clone()
    targets[:, :2] = -100
    numbers = torch.sort(torch.randint(3, (rows, length), generator=rng), 1).values
    return MicroBatch(ids[:, :-1].contiguous(), targets, numbers if documents else None)


def loss_of(model: Transformer, batch: MicroBatch, z_loss: float = 1e-3) -> Tensor:
    """The training loss, per target."""
    hidden = model.hidden(batch.ids, documents=batch.documents)
    return Nebula([next_token(z_loss)])(model.head, hidden, batch).total


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name."""
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


def set_step_load(model: Transformer, counted: Transformer) -> None:
    """Tell the routers how often each expert is chosen by all tokens of a step, which `counted` has seen."""
    for router, other in zip(model.modules(), counted.modules(), strict=True):
        if isinstance(router, Router) and isinstance(other, Router):
            router.step_load.copy_(other.load)


def graphs_of(model: Transformer, run: Callable[[], Tensor]) -> tuple[int, float]:
    """Graphs that the blocks of `model` are compiled to in a forward and backward pass, and how far the result of `run` then differs."""
    expected = run().detach()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.decoder.blocks:
        block.compile(fullgraph=True, backend=counter)
    found = run()
    found.sum().backward()
    torch._dynamo.reset()
    return counter.frame_count, distance(found.detach(), expected)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value."""
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach())
