"""A run that is killed again and again ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.train.trainer import train

# Children are forked from a process that has the libraries loaded but has never computed: starting one takes milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["andromeda.train.trainer"])


def child(config: RunConfig, out: Path) -> None:
    """Train, from wherever the run is."""
    torch.set_num_threads(1)
    train(config, out, resume=(out / "config.toml").exists())


def seconds_of_a_child(config: RunConfig, out: Path) -> float:
    """Train in a child that is left alone; how long it took. This process may be slower, where its lines are counted."""
    begun = FORKS.Process(target=int)
    begun.start()
    begun.join()
    began, process = time.monotonic(), FORKS.Process(target=child, args=(config, out))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def run_with_kills(config: RunConfig, out: Path, draw: random.Random, kills: int, longest: float) -> int:
    """Train in children that are killed after a random time; returns how many were killed at work."""
    killed = 0
    for _ in range(10 * kills):
        process = FORKS.Process(target=child, args=(config, out))
        process.start()
        process.join(draw.uniform(0.02, longest) if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        elif process.exitcode == 0:
            return killed
        else:
            pytest.fail(f"a resumed run ended with {process.exitcode}")
    raise AssertionError("the run never ended")


def settings(tiny: Callable[..., RunConfig], steps: int) -> RunConfig:
    """Muon, a moving average, a mixture of experts whose bias moves, a checkpoint after every step: most kills hit one being written."""
    return tiny(
        train__steps=steps,
        train__checkpoints={"every": 1, "keep": 2},
        train__optim={"kind": "muon", "lr": 0.01},
        train__ema=0.9,
        train__micro_batch_size=2,
        model__feedforward={"kind": "moe", "mlp_ratio": 1.0},
        model__experts={"num_experts": 4, "top_k": 2},
    )


@pytest.mark.parametrize("seed", [0])
def test_killed_runs_end_bit_equal(
    tiny: Callable[..., RunConfig], tmp_path: Path, assert_same_run: Callable[[Path, Path], None], seed: int
) -> None:
    config = settings(tiny, steps=40)
    whole = seconds_of_a_child(config, tmp_path / "whole")
    killed = run_with_kills(config, tmp_path / "killed", random.Random(seed), kills=6, longest=whole / 4)
    assert killed >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_runs_end_bit_equal_many_times(
    tiny: Callable[..., RunConfig], tmp_path: Path, assert_same_run: Callable[[Path, Path], None], seed: int
) -> None:
    config = settings(tiny, steps=120)
    train(config, tmp_path / "whole")
    killed = run_with_kills(config, tmp_path / "killed", random.Random(seed), kills=40, longest=1.0)
    assert killed >= 20
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
