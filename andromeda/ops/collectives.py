"""Collectives that autograd and torch.compile pass through, between the processes of one dimension of a device mesh.

The pairs are those of Megatron-LM (arXiv 1909.08053, section 3): where every process holds the same tensor and each computes a share from
it, the gradient is the sum over the processes (`sum_gradients`); where each holds a share, the sum is taken in the forward pass, and its
gradient is every share's (`sum_shares`). All results are plain tensors, equal on every process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from andromeda.utils.log import get_logger

log = get_logger(__name__)


class Group(NamedTuple):
    """Processes that compute together, as plain values, which torch.compile takes as constants."""

    name: str
    """Under which torch finds the process group."""
    size: int
    rank: int
    """Number of this process among them."""

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        """The processes of a one-dimensional mesh."""
        return cls.of_process_group(mesh.get_group())

    @classmethod
    def of_process_group(cls, group: dist.ProcessGroup) -> Group:
        """The processes of a process group."""
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def all_reduce(x: Tensor, group: Group, operation: str = "sum") -> Tensor:
    """Sum (or `max`) of x over the processes; without gradients."""
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), operation, group.name))
    return out


def all_gather(x: Tensor, group: Group) -> Tensor:
    """x (...) of every process, in their order (size, ...); without gradients."""
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous()[None], group.size, group.name))
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """The share (...) of this process in the sum of x (size, ...) over the processes; without gradients."""
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name))
    return out[0]


def sum_shares(x: Tensor, group: Group) -> Tensor:
    """Sum of x over the processes, each of which holds a share; the gradient of every share is that of the sum."""
    out: Tensor = _SumShares.apply(x, group)
    return out


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """x, which all processes hold alike; the gradient is the sum over what each of them computed from it."""
    out: Tensor = _SumGradients.apply(x, group)
    return out


def gather(x: Tensor, group: Group) -> Tensor:
    """x (...) of every process, in their order (size, ...); the gradient is the sum of what all processes computed from it."""
    out: Tensor = _Gather.apply(x, group)
    return out


class ShareSum:
    """`sum_shares` without gradients, fast for the few numbers of a decoding step.

    Such sums take as long as their start: over NVLink, each process reads the shares of the others from memory that all of them map
    (PyTorch's symmetric memory, without multicast), in one kernel. Where there is no such memory, and for more numbers, the sum
    is the library's all-reduce.
    """

    MOST = 1 << 18
    """Numbers of the largest sum by symmetric memory."""

    def __init__(self, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        self.group = group
        self.is_first = group.rank == 0
        """Whether this process adds what enters the sum once."""
        self._buffer = _symmetric_buffer(group, device, dtype, self.MOST) if device.type == "cuda" else None

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        buffer = self._buffer
        if buffer is None or x.dtype != buffer.dtype or not 0 < x.numel() <= self.MOST:
            return all_reduce(x, self.group)
        out: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer[: x.numel()], x.reshape(-1), "sum", self.group.name)
        return out.view(x.shape)


def _symmetric_buffer(group: Group, device: torch.device, dtype: torch.dtype, size: int) -> Tensor | None:
    """Memory that all processes of the group map; None where they cannot."""
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        buffer = symmetric_memory.empty(size, dtype=dtype, device=device)
        symmetric_memory.rendezvous(buffer, group.name)  # type: ignore[arg-type]
    except RuntimeError as error:
        log.info(
            "Sums of a decoding step go through the library's all-reduce: there is no symmetric memory (%s).", str(error).partition("\n")[0]
        )
        return None
    return buffer


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """Rows of x (N, ...), `sent[r]` of them in order to each process r -> the rows received, `received[r]` from each, in their order.

    The gradient goes back the same way.
    """
    out: Tensor = _AllToAll.apply(x, received, sent, group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        ctx.options = sent, received, group
        return _exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.options), None, None, None


def _exchange(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_to_all_single(x.contiguous(), received, sent, group.name))
    return out
