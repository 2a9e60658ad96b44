"""Expert parallelism (GShard, arXiv 2006.16668): the experts of every mixture are spread over processes that read different tokens.

Each token is sent to the processes of its experts and its results come back: two all-to-alls a layer in the forward pass and two in
the backward pass. Routers, shared experts and everything else are whole on every process; no token is dropped.

Shapes: N (token, expert) pairs of this process, M of those that its experts compute, E experts, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from andromeda.model.transformer import Transformer
from andromeda.ops.collectives import Group, all_to_all
from andromeda.parallel.local_parameters import Gradient, distribute, use_local
from andromeda.utils.errors import ConfigError

DIMENSION = "expert"
"""Name of the dimension of the mesh."""
Compute = Callable[[Tensor, Tensor], Tensor]
"""x (N, C) sorted by expert, and the end of each expert's rows (E,) -> (N, C)."""


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Spread the experts of `model`, built with equal weights on every process of the one-dimensional `mesh`, in place; returns it.

    Afterwards their parameters are DTensors on `mesh`, split by experts, whose gradients are sums over the tokens of all its processes; the
    gradients of all other parameters are of this process's tokens. Raises ConfigError, before anything changes, where experts cannot be
    spread.
    """
    group = Group.of(mesh)
    if group.size == 1:
        return model
    for experts in stacks_of_experts(model, group.size):
        for name, parameter in experts._parameters.items():
            if parameter is not None:
                experts._parameters[name] = distribute(parameter, mesh, 0)
        use_local(experts, {name: (Gradient.OWN, 1) for name, p in experts._parameters.items() if p is not None}, group)
        experts.forward = partial(_dispatch, experts.forward, group)
    return model


def stacks_of_experts(model: nn.Module, count: int) -> list[Any]:
    """The modules whose parameters are stacked by experts (`num_experts`) and that can be spread. Raises ConfigError."""
    found: list[Any] = [module for module in model.modules() if hasattr(module, "num_experts")]
    if not found:
        raise ConfigError(f"parallel.expert = {count} spreads experts, and the model has none: use model.feedforward.kind=moe.")
    for experts in found:
        if experts.num_experts % count:
            raise ConfigError(f"parallel.expert = {count} does not divide model.experts.num_experts ({experts.num_experts}).")
    return found


def is_spread(parameter: Any) -> bool:
    """Whether a parameter is one of experts that are spread over processes."""
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and mesh.mesh_dim_names == (DIMENSION,)


# How many rows go where the host must know; a compiled block is split here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dispatch(compute: Compute, group: Group, x: Tensor, ends: Tensor) -> Tensor:
    """x (N, C) sorted by expert, rows of expert i ending at ends[i] (E,) -> what the experts of all processes give (N, C)."""
    counts = ends.diff(prepend=ends.new_zeros(1)).to(torch.int64)
    one = [1] * group.size
    # Rows from each process for each of the experts here (processes, E / processes).
    here = all_to_all(counts.view(group.size, -1), one, one, group)
    sent, received = counts.view(group.size, -1).sum(1).tolist(), here.sum(1).tolist()
    rows = all_to_all(x, received, sent, group)
    # They come by process and, of each process, by expert.
    expert = torch.arange(here.shape[1], device=x.device).repeat(group.size).repeat_interleave(here.flatten())
    order = expert.argsort(stable=True)
    computed = compute(rows.index_select(0, order), here.sum(0).cumsum(0).to(torch.int32))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return all_to_all(computed.index_select(0, back), sent, received, group)
