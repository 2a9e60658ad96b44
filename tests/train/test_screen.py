"""What is shown while training: the time left, and an end that is saved where nobody reads any more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from andromeda.config.load import dumps
from andromeda.config.run import RunConfig
from andromeda.train import progress
from andromeda.train.progress import PlainTextReporter, TimeLeft

Tiny = Callable[..., RunConfig]


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_time_left_from_the_first_step_on(clock: Clock) -> None:
    """A first step of 60 s, which compiles, and steps of 2 s after it: 2 s for each that is left, as soon as one is known."""
    left, told = TimeLeft(100), []
    assert left.text() == ""
    for step, seconds in ((1, 60), (2, 2), (3, 2), (100, 194)):
        clock.now += seconds
        left.step_done(step)
        told.append(left.text())
    assert told == ["1:39:00", "0:03:16", "0:03:14", ""]


def test_time_left_of_a_resumed_run(clock: Clock) -> None:
    left, told = TimeLeft(100), []
    for step in (51, 52, 53):
        clock.now += 3
        left.step_done(step)
        told.append(left.text())
    assert told == ["0:02:27", "0:02:24", "0:02:21"]


def test_plain_lines_tell_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainTextReporter(10)
    for step in (1, 2):
        clock.now += 5
        reporter.step_done(step)
    reporter.log(2, {"loss": 1.0})
    reporter.log(2, {"validation/loss": 1.0})
    assert capsys.readouterr().out.splitlines() == ["step 2/10  loss 1.0000  0:00:40 left", "step 2/10  validation loss 1.0000"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away_ends_the_run_saved(tiny: Tiny, tmp_path: Path, flags: list[str]) -> None:
    """`andromeda train ... | head -1`: one sentence on stderr, exit code 141, and a checkpoint of the last step."""
    (tmp_path / "tiny.toml").write_text(dumps(tiny(train__steps=100_000, train__log={"every": 1}, train__checkpoints={"every": 0})))
    command = [sys.executable, "-m", "andromeda.cli.main", "train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout
        assert process.stderr
        # The lines before the first step say what is trained; they may be all that was printed when the pipe closes.
        next(line for line in process.stdout if line.startswith(("step ", '{"step')))
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141, said
    line = next(text for text in said.splitlines() if "nobody reads" in text)
    step = int(line.partition("after step ")[2].split()[0])
    assert step > 0
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08}").is_dir()
    assert "Traceback" not in said


def test_a_closed_output_is_one_sentence(tmp_path: Path) -> None:
    """`>&-`: what would be printed is lost, which is said, and nothing else fails."""
    command = f"{sys.executable} -m andromeda.cli.main --version >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert (done.returncode, done.stderr) == (0, "andromeda: Standard output is closed: what this command prints is lost.\n")
