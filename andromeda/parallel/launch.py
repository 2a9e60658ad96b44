"""Start the processes of a run on this host (`andromeda train ... --nproc N`), and tell how they ended.

On several hosts torchrun starts them: `torchrun --nnodes 2 --nproc-per-node 8 ... -m andromeda train ...`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from andromeda.parallel.heartbeat import ADVICE, LOST_EXIT_CODE, give_verdict, last_step

GRACE = 25.0
"""Seconds that the others have to end by themselves when one process has failed."""
SHORT_GRACE = 5.0
"""The same once all know that one was lost."""
POLL = 0.1
SIGNALED = range(-64, 0)
"""Return codes of processes that a signal killed."""


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python -m andromeda ARGUMENTS` as `count` processes of one run; returns the exit code of all.

    SIGINT and SIGTERM are passed on. When a process fails, the others end within GRACE seconds, and a sentence on stderr names it.
    """
    # Kept here and not by rank 0, whose death it has to survive.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [_start(arguments, rank, count, store.port) for rank in range(count)]
    before = {number: signal.signal(number, _forward_to(processes)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes, store)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _start(arguments: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        # As torchrun does: by default every process would use all cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1),
    }
    environment = os.environ | {name: str(value) for name, value in names.items()}
    return subprocess.Popen([sys.executable, "-m", "andromeda", *arguments], env=environment)


def _forward_to(processes: Sequence[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return forward


def _wait(processes: Sequence[subprocess.Popen[bytes]], store: Store) -> int:
    """Wait for all; once one has failed, for GRACE seconds at most."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL)
        if failed is None and (found := [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]):
            failed = found[0]
            # What the others wait for, they have found out themselves, or learn from the store.
            deadline = time.monotonic() + (GRACE if processes[failed].returncode not in (LOST_EXIT_CODE, *SIGNALED) else SHORT_GRACE)
            if _died(processes[failed]):
                _tell(failed, processes[failed], store)
    if failed is None:
        return 0
    code = processes[failed].returncode
    return LOST_EXIT_CODE if _died(processes[failed]) else code


def _died(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process was killed by a signal."""
    return process.returncode in SIGNALED


def _tell(rank: int, process: subprocess.Popen[bytes], store: Store) -> None:
    name = signal.Signals(-process.returncode).name
    sentence = f"Rank {rank} (host {socket.gethostname()}, process {process.pid}) was killed by {name} after step {last_step(store, rank)}"
    print(f"andromeda: {sentence}: {ADVICE}.", file=sys.stderr, flush=True)
    give_verdict(store, sentence, told=True)
