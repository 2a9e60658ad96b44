"""AdamW whose two moments take one byte an element (Dettmers et al., arXiv 2110.02861), from torchao."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from andromeda.utils.errors import MissingExtra

BLOCK = 256
"""Elements that share one scale."""
SMALLEST = 4096
"""Tensors with fewer elements keep 32-bit moments, as the paper does: they cost nothing and are often the sensitive ones."""

WORTH_IT = 1 << 20
"""Elements from which a run of a few hundred steps on a CPU wins back the time that compiling takes."""

Compile = Literal["auto", "on", "off"]


def quantizable(parameter: Tensor) -> bool:
    """Whether torchao would store this parameter's moments in 8 bits."""
    return parameter.numel() >= SMALLEST and parameter.numel() % BLOCK == 0


def adamw8bit(groups: list[dict[str, Any]], compile: Compile, **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit over `groups`, in which each learning rate is a tensor that is changed by `fill_`.

    Its step compiles itself, once for every shape, which takes a minute on a CPU before the first update (seconds when
    it is cached); run eagerly it costs 7 times more a step. `auto` therefore compiles on a GPU, and on a CPU where there
    are enough elements and a C++ compiler (docs/optim.md has the measurement).

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

    compiled = compile == "on" or (compile == "auto" and _worth_compiling([p for group in groups for p in group["params"]]))
    return (AdamW8bit if compiled else Eager)(groups, block_size=BLOCK, **settings)


def _worth_compiling(parameters: list[Tensor]) -> bool:
    if any(p.device.type != "cpu" for p in parameters):
        return True
    return sum(p.numel() for p in parameters) >= WORTH_IT and bool(shutil.which("g++") or shutil.which("clang++"))


def pack(state: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quantized moment as plain tensors and what is needed to build it again."""
    return {"codes": state.codes, "scale": state.scale, "qmap": state.qmap}, {"signed": state.signed}  # type: ignore[attr-defined]


def unpack(tensors: dict[str, Tensor], signed: bool, dtype: torch.dtype) -> Tensor:
    """The quantized moment that `pack` took apart; `dtype` is its parameter's."""
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(tensors["codes"], tensors["scale"], tensors["qmap"], signed, dtype)
