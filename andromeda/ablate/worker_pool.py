"""Runs queued on the available devices: one worker process per GPU (or several, if asked), or one for the CPU.

Each takes the next job when it has finished its own. A process that dies loses only its own job.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from andromeda.ablate.jobs import AblationJob
from andromeda.config.own_code import FLAG, code_allowed
from andromeda.train.signals import SIGNALS
from andromeda.utils.untrusted import open_for_writing

GRACE_SECONDS = 60.0
"""Seconds that a stopped run has to write its checkpoint."""

Request = dict[str, Any]
OnAnswer = Callable[[AblationJob, dict[str, Any]], None]


class WorkerProcess:
    """A child process that answers requests, one at a time; started at the first request."""

    def __init__(self, environment: dict[str, str], log: IO[bytes]) -> None:
        self._environment, self._log = environment, log
        # Here and not where the process begins: that may be in a thread, which knows nothing of consent.
        self._options = [FLAG] if code_allowed() else []
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Request) -> dict[str, Any]:
        """The answer. If the process ends without one, the answer is an error, and the next request starts a new process."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._begin()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = process.wait()
        return {"stopped": -code} if -code in SIGNALS else {"error": f"its process ended with code {code}"}

    def stop(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def close(self, wait: float = GRACE_SECONDS) -> None:
        """Let it end; a process that does not is killed."""
        if self._process is None:
            return
        with suppress(OSError):
            self._process.stdin and self._process.stdin.close()
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _begin(self) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C reaches the parent alone, which then stops each child once.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "andromeda.ablate.worker", *self._options],  # -P: no module of the current folder unasked
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            text=True,
            start_new_session=True,
        )


def environments(device: str, per_device: int) -> list[dict[str, str]]:
    """One environment per worker: the GPU that it sees, and its share of the CPU cores."""
    gpus = _gpus(device)
    places = [gpu for _ in range(per_device) for gpu in (gpus or [""])]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // len(places)))}
    return [{**os.environ, **threads, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})} for gpu in places]


def _gpus(device: str) -> list[str]:
    """Names of the GPUs that `train.device` lets runs use."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    _, colon, index = device.partition(":")
    return [names[int(index)]] if colon else names


@dataclass
class WorkerPool:
    """Runs jobs with one thread and one process per worker."""

    environments: Sequence[dict[str, str]]
    log: Path
    deadline: float | None = None
    """time.monotonic() at which running jobs are stopped and no other is started."""
    lean: bool = False
    stopped: int = 0
    """The signal that ended it, or 0."""
    late: bool = False
    """Whether the deadline ended it."""
    _workers: list[WorkerProcess] = field(default_factory=list)
    _tell: threading.Lock = field(default_factory=threading.Lock)

    def run(self, jobs: Sequence[AblationJob], on_answer: OnAnswer) -> None:
        """Train every job; `told` hears of each answer, one at a time."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.late = True  # nothing to begin: a process that only starts up cannot be stopped yet
            return
        waiting: queue.SimpleQueue[AblationJob] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        with open_for_writing(self.log.parent, self.log, append=True) as log, self._signals():
            self._workers = [WorkerProcess(env, log) for env in self.environments[: max(1, len(jobs))]]
            threads = [threading.Thread(target=self._work, args=(worker, waiting, on_answer), daemon=True) for worker in self._workers]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if self.deadline is not None and time.monotonic() > self.deadline and not self.late:
                    self.late = True
                    self._stop_all(signal.SIGTERM)
                time.sleep(0.1)

    def _work(self, worker: WorkerProcess, waiting: queue.SimpleQueue[AblationJob], on_answer: OnAnswer) -> None:
        with suppress(queue.Empty):
            while not self.stopped and not self.late:
                job = waiting.get_nowait()
                answer = worker.ask(
                    {"do": "train", "folder": str(job.folder), "config": job.config.model_dump(mode="json"), "lean": self.lean}
                )
                with self._tell:
                    on_answer(job, answer)
                if "stopped" in answer:
                    break
        worker.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop all runs after the step that they are in, their state saved."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: object) -> None:
        self.stopped = number
        self._stop_all(signal.SIGTERM)

    def _stop_all(self, number: int) -> None:
        for worker in self._workers:
            worker.stop(number)
