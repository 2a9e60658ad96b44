"""Attention with several backends and one reference, `eager`.

`attend(q, k, v, spec, backend)` computes all of `spec` or raises an error that says why it cannot; no backend ignores a part of
it. A backend is a module with `name`, `unsupported_reason(spec, q, k, v)` and `attend(q, k, v, spec)`.
"""

from andromeda.ops.attention.dispatch import attend, backend_ranking, backends, select_backend
from andromeda.ops.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "attend", "backend_ranking", "backends", "select_backend"]
