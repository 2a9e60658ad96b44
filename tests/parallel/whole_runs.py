"""Whole runs on several processes of this machine, for tests: forked ones, as torchrun would start them."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from andromeda.config.run import RunConfig
from andromeda.train.trainer import train


def train_on(size: int, config: RunConfig, out: Path, dtype: torch.dtype = torch.float64, resume: bool = False) -> None:
    """`andromeda train --nproc SIZE` with weights in `dtype`; fails with the traceback of a process that does. size 0: not distributed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, failure = mp.get_context("fork"), out.with_suffix(".failure")
    ranks = range(max(1, size))
    processes = [context.Process(target=_worker, args=(rank, size, store.port, config, out, dtype, resume, failure)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not failure.exists(), failure.read_text()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _worker(rank: int, size: int, port: int, config: RunConfig, out: Path, dtype: torch.dtype, resume: bool, failure: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if size:
        os.environ |= {name: str(value) for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": True}).items()}
    try:
        train(config, out, resume=resume)
    except BaseException:
        with failure.open("a") as file:
            file.write(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
