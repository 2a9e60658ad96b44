"""One worker of DiLoCo (arXiv 2311.08105), by torchft: synchronization with the workers that are there, and what it sends.

A worker that comes late, or comes back, takes over the state of one that is ahead at its first synchronization.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from andromeda.config.outer_optimizer import DiLoCoConfig
from andromeda.optim import OptimizerContainer
from andromeda.utils.errors import AndromedaError, CheckpointError, MissingExtra

WEIGHTS, MOMENTUM = "weights", "momentum"
"""State of the outer optimizer, by parameter: the weights after the last synchronization, and its momentum."""


class DiLoCoWorker:
    """Synchronizes `model` after every `inner_steps` steps of `optimizer`. Made by `start_worker`.

    manager: a torchft Manager that is in no quorum yet.
    """

    def __init__(self, config: DiLoCoConfig, model: nn.Module, optimizer: OptimizerContainer, manager: Any) -> None:
        from torchft.local_sgd import DiLoCo

        self._model, self._manager = model, manager
        self._names = dict(model.named_parameters())
        self._outer = torch.optim.SGD(
            model.parameters(), lr=config.outer_lr, momentum=config.outer_momentum, nesterov=config.outer_momentum > 0
        )
        self.workers = 1
        """That took part in the last synchronization."""
        self.bytes_sent = 0
        """By this worker: as a ring all-reduce sends them, and state for workers that join."""
        self._count_bytes()
        self._name_failures()
        # torchft acts after a step of one optimizer: of the last, when all have stepped.
        self._diloco = DiLoCo(manager, [model], optimizer.optimizers[-1], self._outer, config.inner_steps, pin_memory=False)

    def _count_bytes(self) -> None:
        manager, transport = self._manager, self._manager._checkpoint_transport
        all_reduce, send = manager.allreduce, transport.send_checkpoint

        def counted_all_reduce(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            work = all_reduce(tensor, *arguments, **keywords)
            self.workers = max(1, manager.num_participants())
            self.bytes_sent += 2 * (self.workers - 1) * tensor.nbytes // self.workers
            return work

        def counted_send(dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
            state = [leaf.nbytes for leaf in tree_leaves(state_dict) if isinstance(leaf, Tensor)]
            self.bytes_sent += len(dst_ranks) * sum(state)
            send(dst_ranks=dst_ranks, step=step, state_dict=state_dict, timeout=timeout)

        manager.allreduce, transport.send_checkpoint = counted_all_reduce, counted_send

    def _name_failures(self) -> None:
        start = self._manager.start_quorum

        def start_quorum(*arguments: Any, **keywords: Any) -> None:
            try:
                start(*arguments, **keywords)
            except (RuntimeError, TimeoutError, ConnectionError) as error:
                raise LighthouseNotFound(
                    f"The workers could not agree on who is there ({' '.join(str(error).split())[:100]}): see whether the lighthouse runs, "
                    "and resume with --resume."
                ) from None

        self._manager.start_quorum = start_quorum

    def __enter__(self) -> DiLoCoWorker:
        self._diloco.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._diloco.__exit__(None, None, None)
        self._manager.shutdown(wait=False)

    def begin(self) -> None:
        """Take the model's weights for those that all workers begin with. Call after they were changed from outside."""
        self._diloco._save_parameters()

    def share(self, state: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:
        """What a worker that joins takes over besides weights and outer momentum. `load` is called within its step."""
        self._manager.register_state_dict_fn("worker", load, state)

    def metrics(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {
            "diloco/bytes_sent": self.bytes_sent,
            "diloco/synchronizations": self._manager.current_step(),
            "diloco/workers": self.workers,
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """State of the outer optimizer; live, not copied."""
        weights = self._diloco._fragments[0].original_parameters
        held = {f"{name}/{WEIGHTS}": tensor for name, tensor in weights.items()}
        momenta = {name: self._outer.state.get(p, {}).get("momentum_buffer") for name, p in self._names.items()}
        return held | {f"{name}/{MOMENTUM}": momentum for name, momentum in momenta.items() if momentum is not None}

    def state_metadata(self) -> dict[str, Any]:
        """What belongs to the state tensors, for JSON."""
        return {
            "inner_step": self._diloco._local_step,
            "synchronizations": self._manager.current_step(),
            "batches": self._manager.batches_committed(),
            "bytes_sent": self.bytes_sent,
        }

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Restore what `state_tensors` and `state_metadata` returned. Raises CheckpointError where weights are missing."""
        weights = self._diloco._fragments[0].original_parameters
        if missing := [name for name in weights if f"{name}/{WEIGHTS}" not in tensors]:
            raise CheckpointError(f"The checkpoint lacks the outer weights of {missing[0]}: it was not written by a worker of DiLoCo.")
        for name, p in self._names.items():
            weights[name].copy_(tensors[f"{name}/{WEIGHTS}"])
            if f"{name}/{MOMENTUM}" in tensors:
                self._outer.state[p]["momentum_buffer"] = tensors[f"{name}/{MOMENTUM}"].to(p.device, copy=True)
        self._diloco._local_step = int(metadata["inner_step"])
        self._manager.load_state_dict({"step": int(metadata["synchronizations"]), "batches_committed": int(metadata["batches"])})
        self.bytes_sent = int(metadata["bytes_sent"])


class LighthouseNotFound(AndromedaError):
    """The process that knows the workers does not answer."""

    exit_code = 1


@contextmanager
def start_worker(config: DiLoCoConfig, model: nn.Module, optimizer: OptimizerContainer) -> Iterator[DiLoCoWorker]:
    """A worker that is known to the lighthouse while the block runs. Raises MissingExtra or LighthouseNotFound."""
    torchft = _import_torchft()
    timeout = timedelta(seconds=config.timeout)
    # torchft tells of every quorum; a failure is raised or shown in the metrics.
    for name in ("torchft.manager", "torchft.local_sgd", "torchft.process_group", "torchft.checkpointing.http_transport"):
        logging.getLogger(name).setLevel(logging.ERROR)
    store = dist.TCPStore(config.address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    try:
        manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timeout),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=config.least_workers,
            use_async_quorum=False,
            # All workers start from the same seed; a late one takes over the state of one that is ahead.
            init_sync=False,
            timeout=timeout,
            quorum_timeout=timeout,
            connect_timeout=min(timeout, timedelta(seconds=30)),
            rank=0,
            world_size=1,
            store_addr=config.address,
            store_port=store.port,
            lighthouse_addr=config.lighthouse,
            replica_id=f"worker{config.worker}",
            port=0,
            hostname=config.address,
        )
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise LighthouseNotFound(
            f"No torchft lighthouse answers at train.diloco.lighthouse = {config.lighthouse!r} ({' '.join(str(error).split())[:100]}): "
            f"start one with `torchft_lighthouse --bind [::]:29510 --min_replicas {config.least_workers}`."
        ) from None
    with DiLoCoWorker(config, model, optimizer, manager) as worker:
        yield worker


def _import_torchft() -> Any:
    os.environ.setdefault("RUST_LOG", "warn")  # or it prints several lines for each synchronization
    try:
        import torchft
    except ImportError:
        raise MissingExtra("torchft", "torchft", "Training with train.diloco.workers") from None
    return torchft
