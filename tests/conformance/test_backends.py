"""Every legal pair of parts, on every attention backend that runs here: what `eager` gives, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from andromeda.errors import ConfigError
from andromeda.kernels.attention import backends
from andromeda.model.transformer import Transformer
from tests.conformance.covering import rows
from tests.conformance.models import ROWS, T, build, ids, use_backend

SOFTMAX = [row for row in ROWS if rows()[row].attention.mechanism == "softmax"]
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 8, [0] * 12])


@contextmanager
def backend(model: Transformer, name: str) -> Iterator[None]:
    """The model on another backend, for a while."""
    use_backend(model, name)
    yield
    use_backend(model, "eager")


def outcome(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """Logits, and the gradient of their mean square for every parameter."""
    out = model(ids(), documents=documents, span=T)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


@pytest.mark.parametrize("name", [name for name in backends() if name != "eager"])
@pytest.mark.parametrize("row", SOFTMAX)
def test_a_backend_agrees_with_eager_or_refuses(row: str, name: str) -> None:
    model = build(row)
    for documents in (None, DOCUMENTS):
        with backend(model, name):
            try:
                found = outcome(model, documents)
            except ConfigError:
                continue
        for a, b in zip(found, outcome(model, documents), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
