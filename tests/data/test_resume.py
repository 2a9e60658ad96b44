"""A build that is killed at any moment can be resumed, and ends with the bytes of a build that was not."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from andromeda.config.data import BuildConfig
from andromeda.data.build import build
from andromeda.data.corpus import verify_corpus
from tests.data.conftest import texts, write_files

CONFIG = BuildConfig(tokenizer="bytes", validation_fraction=0.1, shard_tokens=9000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_child(source: str, out: Path, step: int) -> bool:
    """Build in a forked process that SIGKILLs itself at its step-th chance; returns whether it was killed.

    The chances are the flush of every file, when half of it has got to the disk, and the moment after every rename.
    """
    child = os.fork()
    if child == 0:
        chances = iter(range(10**6))
        fsync, replace = os.fsync, Path.replace

        def dying_fsync(handle: int) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode) and next(chances) == step:
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        def dying_replace(self: Path, target: Path) -> Path:
            result = replace(self, target)
            if next(chances) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        os.fsync, Path.replace = dying_fsync, dying_replace  # type: ignore[method-assign, assignment]
        try:
            build([source], out, CONFIG)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("andromeda.data.sources.TASK_BYTES", 6_000)
    monkeypatch.setattr("andromeda.data.encode.BLOCK_BYTES", 6_000)
    return str(write_files(tmp_path / "raw", texts(60)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_every_step_changes_nothing(source: str, tmp_path: Path) -> None:
    """Each step is tried once on a fresh folder, killed, and finished by a second run."""
    build([source], tmp_path / "whole", CONFIG)
    expected = contents(tmp_path / "whole")
    step = 0
    while killed_child(source, tmp_path / f"{step}", step):
        out = tmp_path / f"{step}"
        build([source], out, CONFIG)
        assert contents(out) == expected
        step += 1
    assert step > 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(source: str, tmp_path: Path) -> None:
    """One folder, in which every run gets only as far as one chance more than the last: it still ends."""
    build([source], tmp_path / "whole", CONFIG)
    runs = 0
    while killed_child(source, tmp_path / "out", runs):
        runs += 1
    assert runs > 10
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_work_is_not_done_again(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill in the last stage, neither the sources are read nor the texts encoded again."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("andromeda.data.build.write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            build([source], tmp_path / "out", CONFIG)
    monkeypatch.setattr("andromeda.data.ingest.read_documents", stop)
    monkeypatch.setattr("andromeda.data.tokenizer.Tokenizer.encode_batch", stop)
    build([source], tmp_path / "out", CONFIG)
    verify_corpus(tmp_path / "out")


@pytest.mark.slow
def test_worker_processes_survive_kills_at_random_times(tmp_path: Path) -> None:
    """The real command with two workers and a trained tokenizer, killed after random times; no worker outlives it."""
    source = str(write_files(tmp_path / "raw", [t * 20 for t in texts(600)]))
    command = [sys.executable, "-m", "andromeda.cli.main", "data", "build", source, "--vocab-size", "400", "--workers", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    draw, kills = random.Random(0), 0
    while True:  # each run gets a little longer, so that it ends on any machine
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            if process.wait(timeout=draw.uniform(0.5, 1.0) * (2 + kills)) == 0:
                break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            for _ in range(100):
                if not group_alive(process.pid):
                    break
                time.sleep(0.1)
            assert not group_alive(process.pid)
    assert kills > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
