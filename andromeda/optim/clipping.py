"""Gradient clipping: none, global norm, value, adaptive. Each returns the norm before it touched anything.

Nothing here waits for the device: the norm is a tensor, and every limit is applied with tensor arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from andromeda.config.train import ClipConfig
from andromeda.utils.dtensor import is_dtensor, local, total_norm

FLOOR = 1e-3
"""Adaptive clipping treats a unit whose weights are smaller than this as if they had this norm (arXiv 2102.06171, section 4)."""


def clip_gradients(parameters: Iterable[nn.Parameter], config: ClipConfig) -> Tensor:
    """Clip the gradients of `parameters` in place; returns their global l2 norm before clipping, shape (), on their device.

    - `norm`: every gradient times min(1, limit / (norm + 1e-6)).
    - `value`: every entry into [-limit, limit].
    - `adaptive`: every unit (`clip_units`) to limit times the norm of its own weights.

    A norm that is not finite comes back as it is and leaves gradients that are not finite: the guard skips such a step.
    Parameters without a gradient are left out; with none at all the norm is 0. Of parameters that are sharded over processes the norm
    is that of all shards, and each process clips what it holds.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in with_grad if p.grad is not None])
    _CLIPPERS[config.kind](with_grad, config.limit, norm)
    return norm


def clip_units(parameters: Iterable[nn.Parameter], limit: float, floor: float = FLOOR) -> None:
    """Adaptive gradient clipping (Brock et al., arXiv 2102.06171, eq. 3), unit-wise and in place.

    A unit is one output row of a matrix (the last dimension is summed over, so that each row of each expert of a stack is
    its own unit) or one whole vector. Its gradient g with weights w is scaled to norm limit * max(|w|, floor) where it is
    longer.

    Trap: the rows of a zero-initialized matrix have |w| = 0, so that only limit * floor (1e-5 at the paper's limit of 0.01)
    of their gradient passes until they have grown. AdamW and Muon do not see the scale of a gradient, and are not slowed
    by it; plain SGD is.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        weight, grad = local(parameter.detach()), local(parameter.grad)
        allowed = _unit_norm(weight).clamp_(min=floor).mul_(limit)
        norm = _unit_norm(grad)
        # A unit within its limit is multiplied by exactly 1; the clamp only guards the division, as in timm's agc.py.
        grad.mul_(torch.where(norm > allowed, allowed / norm.clamp(min=1e-6), torch.ones_like(norm)))


def _unit_norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=-1 if tensor.ndim > 1 else None, keepdim=True)
    return norm


def _none(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    del parameters, limit, norm


def _norm(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    if not any(is_dtensor(parameter) for parameter in parameters):
        clip_grads_with_norm_(parameters, limit, norm)
        return
    # torch's own takes no mixture of plain and sharded gradients.
    grads = _local_grads(parameters)
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))


def _local_grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]


def _value(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    del norm
    grads = _local_grads(parameters)
    torch._foreach_clamp_min_(grads, -limit)
    torch._foreach_clamp_max_(grads, limit)


def _adaptive(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    del norm
    clip_units(parameters, limit)


_CLIPPERS: dict[str, Callable[[list[nn.Parameter], float, Tensor], None]] = {
    "none": _none,
    "norm": _norm,
    "value": _value,
    "adaptive": _adaptive,
}
