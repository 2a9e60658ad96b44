"""Muon: momentum, orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

With gradient g, momentum m and an R x C matrix w, one step is
    m <- mu m + g;  u = g + mu m (Nesterov);  w <- (1 - lr decay) w - lr sqrt(max(1, R / C)) NS5(u)
where NS5 pushes every singular value of u towards 1 with an odd polynomial, and needs only matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a s + b s^3 + c s^5: the steepest slope at zero that still ends near 1. Five rounds map [0.01, 1] into [0.68, 1.13]."""

_SMALLEST = 1e-12
"""Gradients below this norm count as zero; anything above is scale-free."""

_BATCH = 1 << 26
"""Most elements of one batch, so that stacking equal shapes never doubles the memory of a large model."""


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Newton-Schulz: (..., R, C) to the same shape with all singular values near 1, the singular vectors kept.

    Normalized by the Frobenius norm in at least float32, iterated in `dtype` (default: `iteration_dtype`), which is also
    the dtype of the result.
    """
    dtype = dtype or iteration_dtype(matrices)
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns).to(torch.promote_types(matrices.dtype, torch.float32))
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST)).to(dtype)
    # The Gram matrix is taken on the shorter side: fewer and smaller products.
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


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions; leading dimensions are a batch of matrices (stacked experts).

    The momentum is an entry of each group, like `lr`: whoever drives the optimizer writes its warm-up there. The
    update does not depend on the gradient's scale, so that clipping only changes how much one batch weighs in the momentum.
    torch.optim.Muon keeps m <- mu m + (1 - mu) g instead: the same update while mu is constant, another while it warms up.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "dtype": dtype})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon updates matrices; a parameter of shape {tuple(parameter.shape)} belongs to AdamW.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch in _batches(p for p in group["params"] if p.grad is not None):
                self._update(batch, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape together: a few large batched products instead of many small ones."""
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = [self._buffer(p) for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        updates = torch.stack(torch._foreach_add(grads, buffers, alpha=momentum))
        directions = orthogonalize(updates, group["steps"], group["dtype"]).to(parameters[0].dtype)
        rows, columns = parameters[0].shape[-2:]
        torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(directions.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of equal shape, dtype and device together, at most `_BATCH` elements at a time."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for group in alike.values():
        size = max(1, _BATCH // max(1, group[0].numel()))
        for start in range(0, len(group), size):
            yield group[start : start + size]
