"""Every part in bfloat16, by cast weights and by autocast: near the float64 result, and one type for all that meets in attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from andromeda.model import attention, sigmoid_attention
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.attention.eager import attend
from tests.conformance.covering import CHOICES, DEFAULTS, model_config

ALONE = [next(iter(DEFAULTS.items())), *(choice for choice in CHOICES if choice[1] != DEFAULTS[choice[0]])]
every_part = pytest.mark.parametrize(("slot", "value"), ALONE)


def ids() -> Tensor:
    return torch.randint(0, 29, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, ...]]:
    """The types of queries, keys and values of every attention call."""
    seen: set[tuple[torch.dtype, ...]] = set()

    def watched(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec, backend: str = "auto") -> Tensor:
        seen.add((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, pattern)

    def logits(q: Tensor, k: Tensor, pattern: AttentionSpec) -> Tensor:
        seen.add((q.dtype, k.dtype, k.dtype))
        return plain(q, k, pattern)

    plain = sigmoid_attention.attention_logits
    monkeypatch.setattr(attention, "attend", watched)
    monkeypatch.setattr(sigmoid_attention, "attention_logits", logits)
    return seen


def near(found: Tensor, exact: Tensor, value: str) -> bool:
    """Relative error of each token's logits under 5 %; with experts of most tokens, for rounding may choose another expert."""
    errors = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return bool((errors < 0.05).float().mean() >= (0.7 if value.startswith("moe") else 1.0))


@every_part
def test_bfloat16_weights(slot: str, value: str, types: set[tuple[torch.dtype, ...]]) -> None:
    model = Transformer(model_config({slot: value} if slot != "init" else {slot: value, "embedding": "normed"}), seed=1)
    model.head.weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    rounded = model.bfloat16()
    with torch.no_grad():
        found = rounded(ids(), span=12)
        cache = DynamicKVCache()
        decoded = torch.cat([rounded(part, cache=cache, span=12) for part in ids().split([5, 1, 6], 1)], 1)
    types_seen = set(types)
    with torch.no_grad():
        exact = rounded.double()(ids(), span=12)
    assert types_seen == {(torch.bfloat16,) * 3}
    assert found.dtype == torch.bfloat16
    assert near(found, exact, value)
    assert near(decoded, exact, value)


@every_part
def test_autocast(slot: str, value: str, types: set[tuple[torch.dtype, ...]]) -> None:
    model = Transformer(model_config({slot: value} if slot != "init" else {slot: value, "embedding": "normed"}), seed=1)
    model.head.weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids())
        found.float().square().mean().backward()
    assert types == {(torch.bfloat16,) * 3}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
    assert near(found.detach(), model.double()(ids()).detach(), value)
