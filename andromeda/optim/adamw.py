"""AdamW (arXiv 1711.05101), torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from andromeda.config.train import OptimizerConfig
from andromeda.optim.optimizer_kind import FLOAT_BYTES, Compile, OptimizerKind, ParamGroups
from andromeda.utils.dtensor import is_dtensor, local


class ShardedAdamW(torch.optim.AdamW):
    """torch's, updating what this process holds of sharded parameters as plain tensors: dispatching each as a DTensor takes the host
    longer than the update takes a GPU."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[], [], [], [], [], []]  # parameters, gradients, both moments, none, steps
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            params, grads, means, squares, none, steps = ([local(tensor) for tensor in tensors] for tensors in lists)
            beta1, beta2 = group["betas"]
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "fused")}
            adamw(params, grads, means, squares, none, steps, amsgrad=False, beta1=beta1, beta2=beta2, **settings)
        return None


class AdamW(OptimizerKind):
    """torch.optim.AdamW, fused where every parameter allows it; also for the parameters that another optimizer does not handle."""

    Config = OptimizerConfig
    updates_in_place = True

    @classmethod
    def build(cls, groups: ParamGroups, config: OptimizerConfig, compile: Compile) -> torch.optim.Optimizer:
        del compile
        kind = ShardedAdamW if any(is_dtensor(p) for group in groups for p in group["params"]) else torch.optim.AdamW
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        return kind(groups, betas=config.betas, eps=config.eps, fused=fused)

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: OptimizerConfig) -> int:
        """Two moments and a step count."""
        del config
        return 2 * parameter.numel() * FLOAT_BYTES + FLOAT_BYTES
