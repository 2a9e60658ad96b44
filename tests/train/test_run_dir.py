"""The run folder's lock, and that metrics are cut where a checkpoint ends."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from andromeda.train.metrics import MetricsFile
from andromeda.train.run_dir import RunDir
from andromeda.utils.errors import CheckpointError

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["andromeda.train.trainer"])


def hold(path: Path) -> None:
    """Lock a folder and stay."""
    folder = RunDir(path)
    folder.lock()
    (path / "held").write_text("")
    time.sleep(100)


def test_one_process_at_a_time_and_a_kill_gives_the_lock_back(tmp_path: Path) -> None:
    other = FORKS.Process(target=hold, args=(tmp_path,))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=rf"Another process \(id {other.pid}\) is training in"):
        RunDir(tmp_path).lock()
    other.kill()
    other.join()
    folder = RunDir(tmp_path)
    folder.lock()
    folder.unlock()
    RunDir(tmp_path).lock()


def test_metrics_are_cut_and_never_lengthened(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log(1, {"loss": 2.0})
    size = file.sync()
    assert size == (tmp_path / "metrics.jsonl").stat().st_size
    file.log(2, {"loss": float("nan"), "event": "é"})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {"step": 2, "loss": None, "event": "é"}
    file.close()
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate(size)
    file.log(3, {})
    file.truncate(10**6)
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n{"step": 3}\n'


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / "config.toml.123.part").write_text("half")
    folder = RunDir(tmp_path)
    folder.lock()
    assert not list(tmp_path.glob("*.part"))
