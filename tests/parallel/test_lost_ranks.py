"""A rank that dies or stops is named by the others, which end with one exit code; the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from andromeda.config.load import dumps
from andromeda.config.run import RunConfig
from andromeda.parallel import heartbeat
from andromeda.parallel.heartbeat import LOST_EXIT_CODE, start_heartbeat
from tests.parallel.test_equal_training import assert_equal_runs
from tests.train.ranks import exit_codes

LIMIT = 30.0
"""Seconds in which all have to end."""
KILLS = int(os.environ.get("KILLS", "20"))
"""Of the run that is killed again and again."""


def dies_or_waits(rank: int, folder: str) -> None:
    """Rank 1 is killed at step 7; the others wait for it."""
    heartbeat.SILENT_AFTER, heartbeat.INTERVAL = 1.0, 0.1
    beats = start_heartbeat(timeout=60.0)
    beats.at(7)
    time.sleep(0.5)
    sys.stderr = open(f"{folder}/{rank}", "w")  # noqa: SIM115
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT)


def test_the_others_name_a_dead_rank_and_end(tmp_path: Path) -> None:
    start = time.monotonic()
    assert exit_codes(3, dies_or_waits, str(tmp_path)) == [LOST_EXIT_CODE, -signal.SIGKILL, LOST_EXIT_CODE]
    assert time.monotonic() - start < LIMIT
    said = (tmp_path / "0").read_text() + (tmp_path / "2").read_text()
    assert re.search(r"Rank 1 \(host \S+, process \d+\) has not answered for \d+ seconds, after step 7", said)


def lags(rank: int, folder: str) -> None:
    """Rank 2 lives and never reaches the second exchange."""
    heartbeat.SILENT_AFTER, heartbeat.INTERVAL = 60.0, 0.1
    beats = start_heartbeat(timeout=1.0)
    sys.stderr = open(f"{folder}/{rank}", "w")  # noqa: SIM115
    beats.exchange()
    if rank != 2:
        beats.exchange()
    time.sleep(LIMIT)


def test_a_rank_that_lives_and_hangs_is_named(tmp_path: Path) -> None:
    assert exit_codes(3, lags, str(tmp_path)) == [LOST_EXIT_CODE] * 3
    assert "Rank 2 " in "".join(path.read_text() for path in tmp_path.iterdir())


def ends(rank: int) -> None:
    """Rank 0 ends a second before the others."""
    heartbeat.SILENT_AFTER, heartbeat.INTERVAL = 0.3, 0.05
    beats = start_heartbeat(timeout=60.0)
    time.sleep(0.2 if rank == 0 else 1.5)
    beats.stop()
    dist.barrier()


def test_a_rank_that_has_ended_is_not_missed() -> None:
    assert exit_codes(3, ends) == [0, 0, 0]


class Job:
    """`andromeda train CONFIG --nproc 3` as a process, and its ranks."""

    def __init__(self, config: Path, out: Path, log: Path) -> None:
        resumes = (out / "config.toml").exists()
        what = ["--resume"] if resumes else [str(config)]
        command = [sys.executable, "-m", "andromeda", "train", *what, "--nproc", "3", "--out", str(out)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that run, by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for child in map(int, children):
            environment = Path(f"/proc/{child}/environ").read_bytes()
            if number := re.search(rb"\0RANK=(\d+)", b"\0" + environment):
                found[int(number[1])] = child
        return [found[rank] for rank in sorted(found)]


@pytest.fixture
def run(tiny: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a configuration; returns its path and the run's."""

    def make(name: str, **changes: Any) -> tuple[Path, Path]:
        config = tmp_path / f"{name}.toml"
        config.write_text(dumps(tiny(train__batch_size=6, **changes)))
        return config, tmp_path / name

    return make


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_of_a_job_is_named_in_time(run: Callable[..., tuple[Path, Path]], tmp_path: Path, number: int) -> None:
    config, out = run("job", train__steps=100_000, train__eval_every=0)
    job = Job(config, out, tmp_path / "log")
    while not (out / "metrics.jsonl").exists() or b'"step": 3,' not in (out / "metrics.jsonl").read_bytes():
        assert job.process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    os.kill(job.ranks()[2], number)
    start = time.monotonic()
    assert job.process.wait() == LOST_EXIT_CODE
    assert time.monotonic() - start < LIMIT
    assert (tmp_path / "log").read_text().count("Rank 2 (host") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_whose_ranks_are_killed_again_and_again(run: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Twenty times a random rank at a random time, mostly within a save."""
    changes = {"train__steps": 120, "train__checkpoints__every": 1, "train__optim__kind": "muon"}
    config, undisturbed = run("undisturbed", **changes)
    job = Job(config, undisturbed, tmp_path / "log")
    assert job.process.wait() == 0
    config, out = run("killed", **changes)
    draw = random.Random(1)
    for _ in range(KILLS):
        job, before = Job(config, out, tmp_path / "log"), checkpoints(out)
        while checkpoints(out) == before:  # past the start, with a step saved
            assert job.process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.5))
        os.kill(draw.choice(job.ranks()), signal.SIGKILL)
        assert job.process.wait() == LOST_EXIT_CODE, (tmp_path / "log").read_text()
    assert Job(config, out, tmp_path / "log").process.wait() == 0
    assert_equal_runs(undisturbed, out, tolerance=0.0)


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints of a run."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
