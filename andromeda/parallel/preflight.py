"""Before the first step of several processes: whether all were reached, run the same code on the same data, and how fast they exchange."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

import andromeda
from andromeda.config.run import RunConfig
from andromeda.parallel.mesh import ParallelMesh
from andromeda.utils.errors import ConfigError
from andromeda.utils.hardware import recognize

MEASURED_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Size of the all-reduce that is timed."""


def preflight(mesh: ParallelMesh, config: RunConfig, data_fingerprint: str) -> str:
    """Compare and measure, on all processes; returns one sentence about the mesh and its bandwidth.

    Raises ConfigError, the same sentence on every process, that names the first process that differs from the majority, and in what.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _identity(mesh, config, data_fingerprint), group=mesh.host_group)
    for name in found[0]["compared"]:
        values = [one["compared"][name] for one in found]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            rank = next(rank for rank, value in enumerate(values) if value != usual)
            error = ConfigError(
                f"Rank {rank} (host {found[rank]['host']}) has another {name} than the others ({values[rank]} and {usual}): "
                "start all processes with the same code, configuration and files."
            )
            error.told = not mesh.is_main
            raise error
    hosts = len({one["host"] for one in found})
    speed = measure_all_reduce(mesh)
    known = recognize(found[0]["compared"]["kind of device"])
    assumed = f" (`andromeda plan` assumes {known.link / 2e9:.0f})" if known and known.link and hosts == 1 else ""
    devices = f"{len(found)} process{'es' if len(found) > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"
    return f"{devices} ({mesh.layout.describe()}); all-reduce at {speed / 1e9:.3g} GB/s{assumed}"


def _identity(mesh: ParallelMesh, config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else mesh.device.type
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "compared": {
            "version of andromeda": andromeda.__version__,
            "version of torch": torch.__version__,
            "version of Python": platform.python_version(),
            "configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
            "data": data_fingerprint[:12],
            "kind of device": device,
        },
    }


def measure_all_reduce(mesh: ParallelMesh) -> float:
    """Bus bandwidth of an all-reduce over all processes in bytes/s: 2 (n - 1) / n times its size, over its time (as nccl-tests count)."""
    count = dist.get_world_size()
    size = MEASURED_BYTES[mesh.device.type]
    values = torch.zeros(size // 4, device=mesh.device)
    best = float("inf")
    for _ in range(3):  # the first one connects
        _wait(mesh.device)
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(mesh.device)
        best = min(best, time.perf_counter() - start)
    return 2 * max(1, count - 1) / count * size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
