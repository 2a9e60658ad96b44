"""AdamW (arXiv 1711.05101), torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.config.train import OptimizerConfig
from andromeda.optim.optimizer_kind import FLOAT_BYTES, Compile, OptimizerKind, ParamGroups


class AdamW(OptimizerKind):
    """torch.optim.AdamW, fused where every parameter allows it; also for the parameters that another optimizer does not handle."""

    Config = OptimizerConfig
    updates_in_place = True

    @classmethod
    def build(cls, groups: ParamGroups, config: OptimizerConfig, compile: Compile) -> torch.optim.Optimizer:
        del compile
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: OptimizerConfig) -> int:
        """Two moments and a step count."""
        del config
        return 2 * parameter.numel() * FLOAT_BYTES + FLOAT_BYTES
