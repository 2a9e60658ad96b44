"""One attention call, several backends, one reference (`eager`).

`attend(q, k, v, pattern, backend)` computes the whole pattern or says in one sentence why it cannot; no backend ever
drops a part of it. A backend is a module with `name`, `unsupported_reason(pattern, q, k, v)` and `attend(q, k, v, pattern)`.
"""

from andromeda.ops.attention.dispatch import attend, backend_ranking, backends, select_backend
from andromeda.ops.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "attend", "backend_ranking", "backends", "select_backend"]
