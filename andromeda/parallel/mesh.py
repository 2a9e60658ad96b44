"""The device mesh of a run, and what a process is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from andromeda.config.parallel import ParallelConfig
from andromeda.config.run import RunConfig
from andromeda.parallel.heartbeat import Heartbeat, RankLost, start_heartbeat
from andromeda.parallel.layout import DIMENSIONS, Layout, resolve_layout
from andromeda.parallel.layout_rules import check_layout
from andromeda.parallel.split_model import check_model
from andromeda.utils.errors import ConfigError


@dataclass(frozen=True)
class ParallelMesh:
    """All processes of a run, arranged as `layout` says."""

    layout: Layout
    device: torch.device
    mesh: DeviceMesh
    """Dimensions replicate, shard, context, tensor, all of them also where the size is one."""
    expert_mesh: DeviceMesh | None
    """The same processes with `shard` split into `expert_shard` and `expert`; None without expert parallelism."""
    sharded_with_context: DeviceMesh
    """`shard` and `context` as one dimension, below `replicate` where that is above one."""
    expert_batch_group: dist.ProcessGroup | None
    """Processes that have the same experts and read different tokens, which the gradients of these experts are summed over."""
    batch_group: dist.ProcessGroup
    """Processes that hold different tokens (replicate x shard x context): losses and counts are summed over it."""
    host_group: dist.ProcessGroup
    """All processes, for numbers in main memory (gloo)."""
    heartbeat: Heartbeat | None = None
    """Tells who is lost, in a run that was started from the command line."""

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of a step's sequences this process reads, below `layout.data`."""
        at = self.layout.coordinates(self.rank)
        return at["replicate"] * self.layout.shard + at["shard"]

    def dim(self, *names: str) -> DeviceMesh:
        """The mesh of one or more dimensions that this process is in."""
        return self.mesh[names if len(names) > 1 else names[0]]


def is_distributed() -> bool:
    """Whether this process was started as one of several (or one) by torchrun or `--nproc`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Number of processes of the run; 1 where it was not started by torchrun."""
    return int(os.environ["WORLD_SIZE"]) if is_distributed() else 1


def local_device(kind: str) -> torch.device:
    """The device of this process: `kind` is cpu or cuda, of which it takes the one with its number on the host."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_mesh(config: RunConfig, device: torch.device) -> ParallelMesh | None:
    """The mesh of a run that was started as several processes, or None. Raises ConfigError for a layout that cannot work."""
    try:
        check_model(config, check_layout(config, world_size()))
        check_devices(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ConfigError as error:
        error.told = os.environ.get("RANK", "0") != "0"
        raise
    if not is_distributed():
        return None
    mesh = init_mesh(config.parallel, local_device(device.type))
    return replace(mesh, heartbeat=start_heartbeat(config.parallel.timeout))


def check_devices(device: torch.device, processes: int) -> None:
    """Raise ConfigError where `processes` of this host would share GPUs."""
    if device.type == "cuda" and processes > (count := torch.cuda.device_count()):
        raise ConfigError(f"{processes} processes were started on this host, which has {count} GPU{'s'[: count != 1]}: start one a GPU.")


@contextmanager
def watched(mesh: ParallelMesh | None) -> Iterator[None]:
    """Within, an exchange that fails because a process was lost ends with the name of that process; afterwards the processes part."""
    if mesh is None or mesh.heartbeat is None:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        mesh.heartbeat.wait_for_verdict()
        raise RankLost(f"An exchange between processes failed ({str(error).partition(chr(10))[0][:200]}): resume with --resume.") from None
    mesh.heartbeat.stop()
    dist.barrier(group=mesh.host_group)
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "connection", "nccl"))


def init_mesh(config: ParallelConfig, device: torch.device) -> ParallelMesh:
    """Join the other processes and arrange them; call once, on all of them. Raises ConfigError for sizes that do not fit their number.

    Needs the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), unless a process group exists already.
    """
    layout = resolve_layout(config, dist.get_world_size() if dist.is_initialized() else world_size())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout), device_id=bound)
    return build_mesh(layout, device)


def build_mesh(layout: Layout, device: torch.device) -> ParallelMesh:
    """The mesh over the processes of the default process group."""
    mesh = init_device_mesh(device.type, layout.sizes(), mesh_dim_names=DIMENSIONS)
    # One-dimensional groups of several dimensions, for reductions.
    batch = mesh["replicate", "shard", "context"]._flatten("batch")
    expert = expert_batch = None
    if layout.expert > 1:
        sizes = (layout.replicate, layout.shard // layout.expert, layout.expert, layout.context, layout.tensor)
        expert = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "expert_shard", "expert", "context", "tensor"))
        expert_batch = expert["replicate", "expert_shard", "context"]._flatten("expert_batch").get_group()
    host = dist.new_group(backend="gloo")
    sharded = _sharded_with_context(mesh, layout)
    return ParallelMesh(layout, device, mesh, expert, sharded, expert_batch, batch.get_group(), host)


def _sharded_with_context(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    if layout.context == 1:
        return mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
    flat = mesh["shard", "context"]._flatten("shard_context")
    return mesh["replicate", "shard_context"] if layout.replicate > 1 else flat
