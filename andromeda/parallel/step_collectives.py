"""What a training step exchanges with the other processes of a mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from andromeda.model.transformer import Transformer
from andromeda.parallel import context
from andromeda.parallel.expert import is_spread
from andromeda.parallel.fsdp import keeps_gathered
from andromeda.parallel.mesh import ParallelMesh
from andromeda.parallel.one_process import Collectives
from andromeda.utils.dtensor import is_dtensor, local

FLATTENED = 1 << 20
"""Gradients of fewer elements are summed together, as one tensor."""


class MeshCollectives(Collectives):
    """The processes of a mesh."""

    def __init__(self, mesh: ParallelMesh, model: Transformer) -> None:
        self.mesh, self.layout, self.is_main = mesh, mesh.layout, mesh.is_main
        self._model: Any = model
        self._is_sharded = hasattr(model, "set_requires_gradient_sync")
        self._keeps_gathered = self._is_sharded and keeps_gathered(model)
        self._context = context.parallelize(model, mesh.dim("context")) if mesh.layout.context > 1 else None

    def rows(self, first: int, count: int) -> tuple[int, int]:
        each = count // self.layout.data
        return first + self.mesh.data_rank * each, each

    def sum_numbers(self, *numbers: float) -> list[float]:
        # Over all processes, of which those that read the same tokens count as one.
        same = self.layout.world_size / self.layout.data
        self._exchange()
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, group=self.mesh.host_group)
        return [value / same for value in values.tolist()]

    def at(self, step: int) -> None:
        if self.mesh.heartbeat:
            self.mesh.heartbeat.at(step)

    def _exchange(self) -> None:
        if self.mesh.heartbeat:
            self.mesh.heartbeat.exchange()

    def largest(self, number: int) -> int:
        self._exchange()
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.mesh.host_group)
        return int(value)

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.mesh.batch_group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def hidden(self, model: Any, ids: Tensor, documents: Tensor | None, window: int = 0) -> Tensor:
        if self._context is None:
            return super().hidden(model, ids, documents, window)
        return self._context.hidden(ids, documents=documents, window=window)

    def split(self, x: Tensor) -> Tensor:
        return x if self._context is None else self._context.split(x)

    @contextlib.contextmanager
    def gradient_sync(self, last: bool) -> Any:
        if self._is_sharded:
            if self._keeps_gathered:
                # Weights are gathered once for all micro-batches of a step, and gradients scattered once.
                self._model.set_requires_gradient_sync(last)
                self._model.set_reshard_after_backward(last)
            else:
                # Where gathered weights are too large to keep, so are whole gradients: each micro-batch's are scattered.
                self._model.set_requires_gradient_sync(True)
                self._model.set_requires_all_reduce(last)
        yield

    def reduce_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        summed = [p for p in parameters if p.grad is not None and not self._summed_in_backward(p)]
        self._sum_over(self.mesh.batch_group, [p for p in summed if not is_spread(p)])
        if self.mesh.expert_batch_group is not None:
            self._sum_over(self.mesh.expert_batch_group, [p for p in summed if is_spread(p)])

    def _sum_over(self, group: dist.ProcessGroup, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters over the processes of a group."""
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        small = [grad for grad in grads if grad.numel() < FLATTENED or not grad.is_contiguous()]
        works = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads if grad.numel() >= FLATTENED and grad.is_contiguous()]
        for dtype in {grad.dtype for grad in small}:
            alike = [grad for grad in small if grad.dtype == dtype]
            flat = torch.cat([grad.reshape(-1) for grad in alike])
            dist.all_reduce(flat, group=group)
            parts = flat.split([grad.numel() for grad in alike])
            torch._foreach_copy_(alike, [part.view_as(grad) for part, grad in zip(parts, alike, strict=True)])
        for work in works:
            work.wait()

    def _summed_in_backward(self, parameter: nn.Parameter) -> bool:
        """Whether FSDP sums its gradient."""
        if not (self._is_sharded and is_dtensor(parameter)):
            return False
        names = parameter.device_mesh.mesh_dim_names or ()  # type: ignore[attr-defined]
        return any("shard" in name for name in names)

    def after_evaluation(self) -> None:
        if self._is_sharded:
            for module in self._model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    def share(self, chunks: Sequence[Any]) -> list[tuple[Any, bool]]:
        count, rank = self.layout.data, self.mesh.data_rank
        rounds = -(-len(chunks) // count)
        numbers = range(rank, rounds * count, count)
        return [(chunks[min(number, len(chunks) - 1)], number < len(chunks)) for number in numbers]
