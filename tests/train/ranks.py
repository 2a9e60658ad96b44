"""Work on several ranks of this machine, for tests: forked processes that talk over gloo."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(size: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(rank, *arguments)` on `size` ranks at once; fails with the traceback of a rank that does."""
    codes, failures = _run(size, work, arguments)
    assert not failures, "\n".join(failures)
    assert codes == [0] * size


def exit_codes(size: int, work: Callable[..., None], *arguments: object) -> list[int | None]:
    """The same, for work that may end in any way; the exit code of each rank."""
    return _run(size, work, arguments)[0]


def _run(size: int, work: Callable[..., None], arguments: tuple[object, ...]) -> tuple[list[int | None], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [context.Process(target=_start, args=(rank, size, folder, work, arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure-*"))]
        return [process.exitcode for process in processes], failures


def _start(rank: int, size: int, folder: str, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        work(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
