"""Models for the conformance tests: float64, and no parameter or balance left where it hides something."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.feedforward.moe import Router
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import backends
from tests.conformance.covering import rows

ROWS = tuple(rows())
T = 12
TOLERANCE = 1e-10
"""On logits of order one, in float64."""


def ids(seed: int = 0, batch: int = 2, length: int = T) -> Tensor:
    """Tokens (B, T)."""
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


def shaken(config: ModelConfig) -> Transformer:
    """A model whose zeros, ones and equal gains are moved apart, so that no part is the identity by chance."""
    model = Transformer(config, seed=1).double().eval()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.votes.copy_(torch.tensor([150, -60, 0, 20]))
    use_backend(model, "eager" if config.attention.mixer == "softmax" else "auto")
    return model


@cache
def build(row: str) -> Transformer:
    """The model of a row, shaken."""
    return shaken(rows()[row])


def use_backend(model: Transformer, name: str) -> None:
    """Let every layer use one attention backend."""
    assert name == "auto" or name in backends()
    for block in model.decoder.blocks:
        block.attention.backend = name


@cache
@torch.no_grad()
def logits(row: str) -> Tensor:
    """Logits (B, T, V) of `ids()` in one pass."""
    return build(row)(ids(), span=T)


def agree(a: Tensor, b: Tensor) -> None:
    """Both are the same up to rounding, and not for want of a signal."""
    assert a.shape == b.shape
    assert b.std() > 0.05
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
