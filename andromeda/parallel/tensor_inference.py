"""Inference by several processes of this machine, which share the work on each token: tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from andromeda.model.transformer import Transformer
from andromeda.parallel import tensor
from andromeda.utils.errors import ConfigError


@contextmanager
def joined_processes(device: torch.device) -> Iterator[DeviceMesh]:
    """All processes that torchrun or `--nproc` started, as a one-dimensional mesh of `device`, that of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bound = device if device.type == "cuda" else None
    dist.init_process_group("cpu:gloo,cuda:nccl" if bound else "gloo", device_id=bound)
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def split(model: Transformer, mesh: DeviceMesh) -> None:
    """Keep this process's share of `model`, in place, before `optimize_for_inference`. Raises ConfigError, which rank 0 alone tells."""
    try:
        tensor.parallelize(model, mesh, inference=True)
    except ConfigError as error:
        error.told = mesh.get_local_rank() > 0
        raise
