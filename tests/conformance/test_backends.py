"""Every legal pair of parts, on every attention backend that runs here: what `eager` gives, forward, backward and decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import backends
from andromeda.utils.errors import ConfigError
from tests.conformance.checks import DOCUMENTS
from tests.conformance.covering import rows
from tests.conformance.models import T, build, ids, use_backend


def features(config: ModelConfig) -> tuple[Any, ...]:
    """What a backend can tell apart."""
    a = config.attention
    return (
        config.alibi,
        (a.num_heads, a.num_kv_heads),
        (a.sliding_window, a.full_attention_interval),
        a.softcap,
        a.scale,
        a.qk_norm,
        config.rotary.kind,
        config.layers,
    )


def telling() -> list[str]:
    """Rows of softmax attention that hold every pair of features, those left out that bring none."""
    chosen, seen = [], set()
    for row, config in rows().items():
        pairs = set(combinations(enumerate(features(config)), 2))
        if config.attention.mixer == "softmax" and not pairs <= seen:
            chosen.append(row)
            seen |= pairs
    return chosen


SOFTMAX = telling()
OTHERS = [name for name in backends() if name != "eager"]


@contextmanager
def backend(model: Transformer, name: str) -> Iterator[None]:
    """The model on another backend, for a while."""
    use_backend(model, name)
    yield
    use_backend(model, "eager")


def learning(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """Logits, and the gradient of their mean square for every parameter."""
    out = model(ids(), documents=documents, span=T)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


@torch.no_grad()
def reading(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """Logits of one pass without gradients."""
    return [model(ids(), documents=documents, span=T)]


@torch.no_grad()
def writing(model: Transformer, documents: Tensor | None) -> list[Tensor]:
    """Logits of the last tokens, decoded one after the other; the cache is filled by `eager`."""
    chosen, cache = model.decoder.blocks[0].attention.backend, DynamicKVCache()
    with backend(model, "eager"):
        model(ids()[:, : T - 3], documents=None if documents is None else documents[:, : T - 3], cache=cache, span=T)
    use_backend(model, chosen)
    places = [slice(t, t + 1) for t in range(T - 3, T)]
    return [model(ids()[:, t], documents=None if documents is None else documents[:, t], cache=cache, span=T) for t in places]


def agreed(row: str, name: str, run: Callable[[Transformer, Tensor | None], list[Tensor]]) -> int:
    """How often the backend did not refuse; what it gave then is what `eager` gives."""
    model, accepted, reasons = build(row), 0, []
    for documents in (None, DOCUMENTS):
        with backend(model, name):
            try:
                found = run(model, documents)
            except ConfigError as error:
                reasons.append(str(error))
                continue
        accepted += 1
        for a, b in zip(found, run(model, documents), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for reason in reasons:
        assert re.fullmatch(rf"Attention backend '{name}' cannot compute this call: [^\n]+; use backend auto or eager\.", reason)
    return accepted


@pytest.mark.parametrize("row", SOFTMAX)
def test_sdpa_agrees_with_eager(row: str) -> None:
    assert agreed(row, "sdpa", learning) == (0 if rows()[row].attention.softcap else 2)


@pytest.mark.parametrize("row", SOFTMAX)
def test_decode_agrees_with_eager(row: str) -> None:
    assert agreed(row, "decode", writing) == 2


@pytest.mark.parametrize("row", SOFTMAX[::6])
def test_flex_agrees_with_eager(row: str) -> None:
    assert agreed(row, "flex", reading) == 2


SERVED: dict[str, tuple[Callable[[Transformer, Tensor | None], list[Tensor]], ...]] = {
    "sdpa": (learning, reading, writing),
    "decode": (writing,),
    "flash": (),
    "cudnn": (),
    "flex": (reading, writing),
    "fa4": (),
}
"""What each backend computes on a CPU in float64 (docs/attention.md); sdpa has no soft cap."""


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("run", [learning, reading, writing], ids=lambda run: run.__name__)
def test_a_backend_computes_what_it_should_and_refuses_the_rest(
    name: str, run: Callable[[Transformer, Tensor | None], list[Tensor]]
) -> None:
    """With documents and without; nothing in between, and nothing refused that it could do."""
    capped = [row for row in SOFTMAX if rows()[row].attention.softcap]
    for row in [*SOFTMAX[::20], capped[0]]:
        served = run in SERVED[name] and not (name == "sdpa" and row in capped)
        assert agreed(row, name, run) == (2 if served else 0), f"{name} {'refused' if served else 'did not refuse'} {row}"
