"""FLOPs of a part, by what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def flops_of(part: nn.Module, keys: Callable[[int], float]) -> dict[str, float]:
    """Forward FLOPs of one token by name; keys(window) is how many keys a token meets on average in a layer with that window.

    A part says them by `flops(keys)`. Of one that does not, the linear layers are counted, under the name of its class.
    """
    if hasattr(part, "flops"):
        said: Any = part.flops
        return dict(said(keys))
    linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
    return {type(part).__name__: sum(2.0 * linear.in_features * linear.out_features for linear in linears)}
