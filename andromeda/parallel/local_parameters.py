"""Modules whose parameters are DTensors and whose computation sees plain tensors.

A parameter that is split, or whole on every process, is a DTensor: optimizers, gradient norms and checkpoints read its placement there. A
forward pass needs this process's piece alone, since kernels take plain tensors. So the class of a module is exchanged for a subclass in
which each such parameter is a property that gives the piece, through which gradients flow back to the DTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from andromeda.model.specs import states
from andromeda.ops.collectives import Group, sum_gradients

STATEMENTS = ("fused_spec", "tensor_plan")
"""Methods by which a part says what it computes, which the subclass repeats: it computes the same."""


class Gradient(Enum):
    """What a process computes of a parameter's gradient."""

    OWN = "own"
    """All that there is: of its piece, or of a whole parameter that all processes use alike."""
    PARTIAL = "partial"
    """A share: the parameter is whole on every process, and each uses it for a share of the output."""


def distribute(parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None) -> nn.Parameter:
    """The parameter, which all processes of a one-dimensional mesh hold alike, as a DTensor: split along `dim` into equal pieces, or
    whole (None)."""
    if dim is None:
        local, placement = parameter.detach(), Replicate()
    else:
        local = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        placement = Shard(dim)  # type: ignore[assignment]
    made = nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False), requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def use_local(module: nn.Module, views: dict[str, tuple[Gradient, int]], group: Group) -> None:
    """Let `module` compute with this process's piece of the parameters named in `views`: how its gradient is made up, and what its values
    are divided by."""
    if views:
        stated = tuple(name for name in STATEMENTS if states(module, name))
        module.__class__ = _local_class(type(module), tuple(views.items()), stated, group)  # type: ignore[arg-type]


@cache
def _local_class(kind: type, views: tuple[tuple[str, tuple[Gradient, int]], ...], stated: tuple[str, ...], group: Group) -> type:
    """One class for all modules that are alike, so that one compiled block serves all layers."""
    body: dict[str, Any] = {name: property(_getter(name, *how, group)) for name, how in views}
    body |= {name: getattr(kind, name) for name in stated}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **body})


def _getter(name: str, gradient: Gradient, divisor: int, group: Group) -> Callable[[nn.Module], Tensor | None]:
    if gradient is Gradient.PARTIAL:
        return lambda module: _partial(module._parameters[name], divisor, group)
    return lambda module: _local(module._parameters[name])


def _local(parameter: Any) -> Any:
    """This process's piece. Of one that FSDP has sharded further nothing can be computed until it is gathered: it is given as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1 else parameter


def _partial(parameter: Any, divisor: int, group: Group) -> Any:
    """A whole parameter, over `divisor`, of whose gradient every process computes a share."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1:
        return parameter
    whole = sum_gradients(_local(parameter), group)
    return whole / divisor if divisor > 1 else whole
