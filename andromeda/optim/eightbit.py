"""AdamW whose two moments take one byte an element (Dettmers et al., arXiv 2110.02861), from torchao."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.errors import MissingExtra

BLOCK = 256
"""Elements that share one scale."""
SMALLEST = 4096
"""Tensors with fewer elements keep 32-bit moments, as the paper does: they cost nothing and are often the sensitive ones."""


def quantisable(parameter: Tensor) -> bool:
    """Whether torchao would store this parameter's moments in 8 bits."""
    return parameter.numel() >= SMALLEST and parameter.numel() % BLOCK == 0


def adamw8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit over `groups`, in which each learning rate is a tensor that is changed by `fill_`.

    Its step compiles itself, once for every shape: about 36 s on a CPU before the first update. There the step is run
    eagerly instead (measured 3 to 4 times slower than compiled, still below the cost of a forward pass); on a GPU it is compiled.

    Raises MissingExtra when torchao is not installed.
    """
    if not torch.cuda.is_available():
        # torchao's CUDA extensions cannot load here, and it would print one warning for each.
        os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtra("torchao", "eightbit", "The 8-bit optimizer (train.optim.kind = 'adamw8bit')") from error

    class Eager(AdamW8bit):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    return (Eager if on_cpu else AdamW8bit)(groups, block_size=BLOCK, **settings)


def pack(state: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quantised moment as plain tensors and what is needed to build it again."""
    return {"codes": state.codes, "scale": state.scale, "qmap": state.qmap}, {"signed": state.signed}  # type: ignore[attr-defined]


def unpack(tensors: dict[str, Tensor], signed: bool, dtype: torch.dtype) -> Tensor:
    """The quantised moment that `pack` took apart; `dtype` is its parameter's."""
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(tensors["codes"], tensors["scale"], tensors["qmap"], signed, dtype)
