"""AdamW with moments of one byte per element (Dettmers et al., arXiv 2110.02861), from torchao."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.train import OptimizerConfig
from andromeda.optim.optimizer_kind import FLOAT_BYTES, Compile, OptimizerKind, ParamGroups
from andromeda.optim.param_groups import Role
from andromeda.utils.compile_cache import remove_torn_files
from andromeda.utils.errors import MissingExtra

BLOCK = 256
"""Elements that share one scale."""
MIN_QUANTIZED = 4096
"""Tensors with fewer elements keep 32-bit moments, as in the paper: they cost nothing and are often the sensitive ones."""
CODEBOOK_BYTES = 256 * FLOAT_BYTES
"""torchao stores, with every quantized moment, the values that its 256 codes stand for."""
MIN_COMPILED = 1 << 20
"""Elements from which a run of a few hundred steps on a CPU regains the time that compilation takes."""


class AdamW8bit(OptimizerKind):
    """torchao's AdamW8bit for large matrices and the head; embeddings and small tensors keep 32-bit moments."""

    Config = OptimizerConfig
    updates_in_place = True
    packed_names = ("codes", "scale", "qmap")

    @classmethod
    def handles(cls, parameter: Tensor, role: Role) -> bool:
        """What torchao would quantize, except embeddings."""
        return role != "embedding" and parameter.numel() >= MIN_QUANTIZED and parameter.numel() % BLOCK == 0

    @classmethod
    def build(cls, groups: ParamGroups, config: OptimizerConfig, compile: Compile) -> torch.optim.Optimizer:
        """torchao makes each learning rate a tensor, to be changed by `fill_`.

        The step compiles itself, once for every shape, which takes a minute on a CPU before the first update (seconds when cached); in
        eager mode a step takes 7 times longer. `auto` therefore compiles on a GPU, and on a CPU where there are enough elements and a C++
        compiler (docs/optim.md has the measurement).

        Raises MissingExtra when torchao is not installed.
        """
        if not torch.cuda.is_available():
            # torchao's CUDA extensions cannot be loaded here, and it would print a warning for each.
            os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
        try:
            from torchao.optim import AdamW8bit as TorchaoAdamW8bit
        except ImportError as error:
            raise MissingExtra("torchao", "eightbit", "The 8-bit optimizer (train.optim.kind = 'adamw8bit')") from error

        remove_torn_files()

        class EagerAdamW8bit(TorchaoAdamW8bit):  # type: ignore[misc, unused-ignore]  # torchao may be missing
            def step(self, closure: Callable[[], Any] | None = None) -> Any:
                with torch.compiler.set_stance("force_eager"):
                    return super().step(closure)

        compiled = compile == "on" or (compile == "auto" and _should_compile([p for group in groups for p in group["params"]]))
        optimizer: torch.optim.Optimizer = (TorchaoAdamW8bit if compiled else EagerAdamW8bit)(
            groups, block_size=BLOCK, betas=config.betas, eps=config.eps
        )
        return optimizer

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: OptimizerConfig) -> int:
        """Two moments of codes, scales and a codebook each, and a step count."""
        del config
        n = parameter.numel()
        return 2 * (n + n // BLOCK * FLOAT_BYTES + CODEBOOK_BYTES) + FLOAT_BYTES

    @classmethod
    def pack(cls, value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A quantized moment as its codes, scales and codebook."""
        if not hasattr(value, "codes"):
            return super().pack(value)
        return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap}, {"signed": value.signed}  # type: ignore[attr-defined]

    @classmethod
    def unpack(cls, pieces: dict[str, Tensor], values: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """The quantized moment that `pack` took apart."""
        from torchao.optim.subclass_8bit import OptimState8bit

        state: Tensor = OptimState8bit(pieces["codes"], pieces["scale"], pieces["qmap"], values["signed"], dtype)
        return state


def _should_compile(parameters: list[Tensor]) -> bool:
    if any(p.device.type != "cpu" for p in parameters):
        return True
    return sum(p.numel() for p in parameters) >= MIN_COMPILED and bool(shutil.which("g++") or shutil.which("clang++"))
