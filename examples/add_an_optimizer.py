"""An optimizer of your own in one file: Lion (Chen et al., arXiv 2302.06675, algorithm 2).

From the folder of this file, with a corpus from `andromeda data build`:

    andromeda train nano data.corpus=corpus train.optim.kind=add_an_optimizer:Lion train.optim.lr=1e-4 --out runs/lion --allow-code

Its keys are those of `Config`: `train.optim.options.betas=[0.95, 0.98]`. Learning rates by role, weight decay on matrices, schedule,
clipping, checkpoints, `--resume`, the memory check and `andromeda plan` work as for a built-in optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.base import BaseConfig, FloatPair
from andromeda.optim import OptimizerKind


class Lion(torch.optim.Optimizer, OptimizerKind):
    """w <- (1 - lr decay) w - lr sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g."""

    class Config(BaseConfig):
        """Keys of `[train.optim.options]`."""

        betas: FloatPair = (0.9, 0.99)
        """Weight of the momentum in the update, and decay of the momentum."""

    def __init__(self, params: Any, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": 1e-4, "weight_decay": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                direction = torch.lerp(p.grad, state["momentum"], beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: Config) -> int:
        """One momentum, of the parameter's dtype."""
        return parameter.numel() * parameter.element_size()
