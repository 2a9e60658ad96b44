"""A run that was saved by some processes goes on with any other number of them, as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from andromeda.config.run import RunConfig
from andromeda.train import checkpoint
from tests.parallel.test_equal_training import assert_equal_runs
from tests.parallel.whole_runs import _worker, train_on

STEPS = 12


def config(tiny: Callable[..., RunConfig], **changes: Any) -> RunConfig:
    common: dict[str, Any] = {
        "train__steps": STEPS,
        "train__eval_every": 0,
        "train__ema": 0.9,
        "train__optim__kind": "muon",
        "train__checkpoints__every": 6,
        "train__checkpoints__keep": 9,
    }
    return tiny(**common | changes)


def stopped_at(run: Path, step: int, out: Path) -> Path:
    """A copy of a run as it was when it had saved a step."""
    shutil.copytree(run, out)
    for path in checkpoint.list_all(out / "checkpoints"):
        if path.name > checkpoint.dir_name(step):
            shutil.rmtree(path)
    return out


@pytest.mark.parametrize("background", [False, True])
def test_four_processes_then_two_or_one(tiny: Callable[..., RunConfig], tmp_path: Path, background: bool) -> None:
    """Saved by 4 in the middle; resumed by 2 that shard, by 2 that replicate, and by 1: equal weights, states, metrics and rows."""
    settings = config(tiny, train__checkpoints__background=background)
    whole = tmp_path / "whole"
    train_on(4, settings, whole)
    layouts: dict[str, tuple[int, dict[str, Any]]] = {"two": (2, {})}
    if not background:
        layouts |= {"copies": (2, {"parallel__shard": 1, "parallel__replicate": 2}), "one": (0, {})}
    for name, (size, changes) in layouts.items():
        run = stopped_at(whole, 6, tmp_path / name)
        train_on(size, config(tiny, train__checkpoints__background=background, **changes), run, resume=True)
        assert_equal_runs(run, whole)


def killed_within_a_save(run: Path, settings: RunConfig, victim: int, moment: int) -> None:
    """Train on two processes, of which one is killed before a flush of its files; the other is ended once that has happened."""

    def work(rank: int, port: int) -> None:
        flushes, flush = iter(range(10**6)), os.fsync

        def deadly(descriptor: int) -> None:
            if rank == victim and next(flushes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = deadly
        _worker(rank, 2, port, settings, run, torch.float64, False, run.with_suffix(".failure"))

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [mp.get_context("fork").Process(target=work, args=(rank, store.port)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[victim].join()
    assert processes[victim].exitcode == -signal.SIGKILL
    processes[1 - victim].join(2)
    processes[1 - victim].kill()
    processes[1 - victim].join()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_rank_killed_within_a_save(tiny: Callable[..., RunConfig], tmp_path: Path, seed: int) -> None:
    """A random rank at a random moment of a random save, in the background or not: the resumed run is the whole one."""
    draw = random.Random(seed)
    settings = config(tiny, train__checkpoints__background=bool(seed % 2), train__checkpoints__every=3)
    train_on(2, settings, tmp_path / "whole")
    victim = draw.randrange(2)
    # Flushes of each rank between the save of step 0, before which there is nothing to resume, and its last one.
    moment = draw.randrange(*((18, 45), (2, 14))[victim])
    killed_within_a_save(tmp_path / "run", settings, victim, moment)
    train_on(2, settings, tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
