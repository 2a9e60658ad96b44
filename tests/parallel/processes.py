"""Several processes of a test, joined by gloo: one start serves many cases."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300
"""Seconds until a test gives up on its processes."""


def run_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, a function of a module, returns on each of `count` processes, in their order. Raises what one raised."""
    context = mp.get_context("spawn")
    answers: Any = context.Queue()
    port = _free_port()
    workers = [context.Process(target=_work, args=(rank, count, port, answers, function, args), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < count:
            rank, value, error = answers.get(timeout=TIMEOUT)
            if error:
                raise AssertionError(f"process {rank}:\n{error}")
            found[rank] = value
    except Empty:
        raise AssertionError(f"no answer of processes {sorted(set(range(count)) - set(found))} within {TIMEOUT} s") from None
    finally:
        for worker in workers:
            worker.join(5 if len(found) == count else 0)
            worker.kill()
    return [found[rank] for rank in range(count)]


def _work(rank: int, count: int, port: int, answers: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        answers.put((rank, function(*args), ""))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
