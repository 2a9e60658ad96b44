"""Muon: momentum, orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

With gradient g, momentum m and an R x C matrix w, one step is
    m <- mu m + g;  u = g + mu m (Nesterov);  w <- (1 - lr decay) w - lr sqrt(max(1, R / C)) NS5(u)
where NS5 moves every singular value of u towards 1 with an odd polynomial, and needs only matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from andromeda.config.train import OptimizerConfig
from andromeda.optim.matrix_sharing import map_matrices, num_workers
from andromeda.optim.optimizer_kind import FLOAT_BYTES, Compile, OptimizerKind, ParamGroups
from andromeda.optim.param_groups import Role
from andromeda.utils.dtensor import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a s + b s^3 + c s^5: the steepest slope at zero that still ends near 1. Five iterations map [0.01, 1] into [0.68, 1.13]."""

_MIN_NORM = 1e-12
"""Gradients below this norm count as zero; anything above is scale-free."""

_MAX_BATCH = 1 << 26
"""Most elements of one batch, so that stacking equal shapes never doubles the memory of a large model."""


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Newton-Schulz: (..., R, C) to the same shape with all singular values near 1, the singular vectors kept.

    Normalized by the Frobenius norm in at least float32, iterated in `dtype` (default: `iteration_dtype`), which is also
    the dtype of the result.
    """
    dtype = dtype or iteration_dtype(matrices)
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns).to(torch.promote_types(matrices.dtype, torch.float32))
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_MIN_NORM)).to(dtype)
    # The Gram matrix of the shorter side: fewer and smaller matmuls.
    x = x.mT if rows > columns else x
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    return x.reshape(matrices.shape)


def iteration_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 on accelerators; on a CPU float32, which was measured 4 times faster there, and float64 for float64."""
    if tensor.dtype == torch.float64:
        return torch.float64
    return torch.float32 if tensor.device.type == "cpu" else torch.bfloat16


class Muon(torch.optim.Optimizer, OptimizerKind):
    """Muon for parameters of two or more dimensions; leading dimensions are a batch of matrices (stacked experts).

    The momentum is an entry of each param group, like `lr`, and its warm-up is written there. The update does not depend on the scale of
    the gradient, so that clipping only changes how much one batch weighs in the momentum. torch.optim.Muon keeps m <- mu m + (1 - mu) g
    instead: the same update while mu is constant, another one while it warms up.
    """

    Config = OptimizerConfig
    default_lrs = MappingProxyType({"embedding": 0.3, "head": 0.004, "scalar": 0.04})
    """Of AdamW for the other roles: those of modded-nanogpt's record of 2024-12-04."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.process_group: Any = None
        """Processes that all hold the same plain parameters and gradients, and share the orthogonalization; None is this one alone.
        Of sharded parameters (DTensor) the processes of the shards share it."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "dtype": dtype})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon updates matrices; a parameter of shape {tuple(parameter.shape)} belongs to AdamW.")

    @classmethod
    def handles(cls, parameter: Tensor, role: Role) -> bool:
        """Matrices."""
        del parameter
        return role == "matrix"

    @classmethod
    def build(cls, groups: ParamGroups, config: OptimizerConfig, compile: Compile) -> Muon:
        del compile
        return cls(groups, momentum=config.momentum, steps=config.newton_schulz_steps)

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: OptimizerConfig) -> int:
        """The momentum."""
        del config
        return parameter.numel() * FLOAT_BYTES

    @classmethod
    def before_step(cls, optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
        """Momentum warm-up: linear from `momentum_start` at step 0 to `momentum` at step `momentum_warmup`."""
        share = min(1.0, step / config.momentum_warmup) if config.momentum_warmup else 1.0
        for group in optimizer.param_groups:
            group["momentum"] = (1.0 - share) * config.momentum_start + share * config.momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch in _equal_shapes((p for p in group["params"] if p.grad is not None), self.process_group):
                self._update(batch, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape together: a few large batched matmuls instead of many small ones."""
        lr, momentum = group["lr"], group["momentum"]
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        buffers = [local(self._buffer(p)) for p in parameters]
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=momentum)
        orthogonal = partial(orthogonalize, steps=group["steps"], dtype=group["dtype"])
        directions = list(map_matrices(orthogonal, updates, parameters, self.process_group))
        rows, columns = parameters[0].shape[-2:]
        torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _equal_shapes(parameters: Iterable[Tensor], process_group: Any) -> Iterator[list[Tensor]]:
    """Parameters of equal shape, dtype, device and sharding together, at most `_MAX_BATCH` elements of each process at a time."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        sharding = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device, sharding), []).append(parameter)
    for group in alike.values():
        size = max(1, _MAX_BATCH // max(1, group[0].numel())) * num_workers(group[0], process_group)
        for start in range(0, len(group), size):
            yield group[start : start + size]
