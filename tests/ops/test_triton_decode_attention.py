"""The kernel for one query against the reference in float64: every pattern, on caches with room behind the query."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from andromeda.ops.attention import AttentionSpec, eager
from tests.ops import interpreted

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
    from andromeda.ops.triton import decode_attention

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
    found = decode_attention.decode_attention(
        q, k, v, 0.3, **settings, index=at, config=decode_attention.LAUNCH_CONFIG._replace(programs=programs)
    )
    assert found.shape == (B, 1, H, 24)
    expected = eager.attend(q.double(), k.double(), v.double(), AttentionSpec(0.3, **settings, query_index=at))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_kernel_under_the_interpreter() -> None:
    interpreted.run(__file__)
