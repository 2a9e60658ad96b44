"""Which backend computes a pattern: the one asked for, or with `auto` the first that accepts it."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from andromeda.errors import ConfigError, nearest
from andromeda.kernels.attention import eager, sdpa
from andromeda.kernels.attention.pattern import Pattern

_BACKENDS = {module.name: module for module in (sdpa, eager)}
"""In the order in which `auto` tries them."""


def backends() -> dict[str, ModuleType]:
    """Every backend by name, fastest first."""
    return dict(_BACKENDS)


def choose(name: str, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    """The backend for this call. A named one that refuses is an error; `auto` goes on to the next."""
    if name == "auto":
        return next(b for b in _BACKENDS.values() if b.refuse(pattern, q, k, v) is None)
    if name not in _BACKENDS:
        raise ConfigError(f"There is no attention backend {name!r}{nearest(name, ['auto', *_BACKENDS])}.")
    reason = _BACKENDS[name].refuse(pattern, q, k, v)
    if reason:
        raise ConfigError(f"Attention backend {name!r} cannot compute this pattern: {reason}; use backend auto or eager.")
    return _BACKENDS[name]


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: str = "auto") -> Tensor:
    """Attention of q (B, T, H, D) over k (B, S, G, D) and v (B, S, G, Dv): (B, T, H, Dv). Query head h reads key/value head h // (H / G)."""
    return choose(backend, pattern, q, k, v).attend(q, k, v, pattern)
