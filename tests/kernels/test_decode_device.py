"""The kernel for one query against the reference in float64: every pattern, on caches with room behind the query."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from andromeda.config.load import load
from andromeda.kernels.attention import Pattern, eager
from andromeda.model.position import build_rotary
from andromeda.model.position.alibi import FoldedBias, NoBias
from andromeda.model.prepare import known, plain
from andromeda.model.qk_norm import build_qk_norm
from tests.kernels import interpreted

PATTERNS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "window": {"window": 37},
    "documents": {"documents": True},
    "ALiBi": {"slopes": True},
    "soft cap": {"softcap": 2.0},
    "all at once": {"window": 60, "documents": True, "slopes": True, "softcap": 2.0},
}
SHAPES = ((1, 6, 1, 16), (2, 4, 2, 12), (1, 3, 3, 40))
"""Sequences, query heads, key heads, head dimensions."""


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "H", "G", "D"), SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("index", [None, 0, 16, 99])
@pytest.mark.parametrize("programs", [1, 13])
def test_the_kernel_is_attention(B: int, H: int, G: int, D: int, pattern: dict[str, Any], index: int | None, programs: int) -> None:
    """What lies behind the query is poisoned."""
    from andromeda.kernels.device import decode

    device, S = interpreted.device(), 131
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(B, n, heads, d, device=device, generator=g) for n, heads, d in ((1, H, D), (S, G, D), (S, G, 24)))
    at = None if index is None else torch.tensor(index, device=device)
    last = S - 1 if index is None else index
    k[:, last + 1 :], v[:, last + 1 :] = 1e4, 1e4
    # The newest document begins 10 tokens before the query.
    numbers = (torch.arange(S, device=device) > last - 10).long().expand(B, -1).contiguous()
    settings = {
        "window": pattern.get("window", 0),
        "documents": (numbers[:, last : last + 1].contiguous(), numbers) if pattern.get("documents") else None,
        "slopes": torch.linspace(0.5, 0.0, H, device=device) if pattern.get("slopes") else None,
        "softcap": pattern.get("softcap", 0.0),
    }
    found = decode.attend(q, k, v, 0.3, **settings, index=at, launch=decode.LAUNCH._replace(programs=programs))
    assert found.shape == (B, 1, H, 24)
    expected = eager.attend(q.double(), k.double(), v.double(), Pattern(0.3, **settings, index=at))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


FORMS: dict[str, list[str]] = {
    "nothing": ["model.rotary.kind=none", "model.attention.qk_norm=none"],
    "halves turn": ["model.attention.qk_norm=none", "model.rotary.layout=half", "model.rotary.fraction=1.0"],
    "xPos, scale of each dimension": [],
    "a part turns, scale of each head": ["model.rotary.layout=half", "model.attention.qk_norm=l2_head_scale"],
    "RMS, pairs side by side": ["model.attention.qk_norm=rms", "model.rotary.fraction=1.0"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("B", "H", "G", "index"), [(1, 6, 1, 99), (2, 4, 2, 0), (3, 4, 2, 32)])
@pytest.mark.parametrize("pattern", ["plain", "window", "slopes", "folded"])
def test_queries_and_the_newest_key_as_projected(
    changes: list[str], B: int, H: int, G: int, index: int, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model's own parts and attention in float64; the newest key stands in the cache afterwards, and nothing else changed."""
    from andromeda.kernels import qk
    from andromeda.kernels.device import decode

    monkeypatch.setattr(qk, "accepts", lambda q, k, form: True)
    device, S, D, tail = interpreted.device(), 131, 24, 4 * (pattern == "folded")
    sizes = [f"model.attention.heads={H}", f"model.attention.kv_heads={G}", f"model.attention.head_dim={D}"]
    config = load("andromeda", ["model.alibi.heads=0", "model.alibi.fold=false", *sizes, *changes]).model
    g = torch.Generator(device).manual_seed(0)
    q, k, keys, values = (
        torch.randn(B, *shape, device=device, generator=g) for shape in ((1, H, D), (1, G, D), (S, G, D + tail), (S, G, 16))
    )
    norm = build_qk_norm(config).to(device)
    for scale in norm.scales:
        if scale is not None:
            torch.nn.init.normal_(scale, 1.0, 0.3)
    rotation = build_rotary(config).to(device)(torch.arange(B, device=device)[:, None] + index, S, torch.float32)
    slopes = torch.linspace(0.25, 0.0, H, device=device, dtype=torch.float64)
    digits = torch.tensor([[0, 0, index, 0]], device=device)
    bias = FoldedBias(slopes, digits) if tail else NoBias()
    if tail:
        keys[..., D:] = torch.stack([torch.arange(S, device=device) * (n == 2) for n in range(4)], -1)[:, None]
    form = known(q, k, norm, rotation, bias, 0.3)
    assert form is not None
    at, window = torch.tensor(index, device=device), 40 if pattern == "window" else 0
    own = slopes.float() if pattern == "slopes" else None
    projected = decode.Projected(k, (form.q_scale, form.k_scale), list(form.tables), list(form.tails), form.norm, form.layout)
    held = keys.clone()
    found = decode.attend(q, held, values, 0.3, window, None, own, 0.0, at, projected)
    with torch.no_grad():
        queries, key = plain(q.double(), k.double(), norm.double(), rotation, bias, 0.3)
    keys[:, index] = key[:, 0].float()
    expected = eager.attend(queries, keys.double(), values.double(), Pattern(0.3, window, None, own, index=at))
    torch.testing.assert_close(held, keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_kernel_under_the_interpreter() -> None:
    interpreted.run(__file__)
