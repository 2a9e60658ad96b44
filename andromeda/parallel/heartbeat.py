"""Each process tells the others every second that it lives, and at which step it is; one that hangs or dies is named by all the others.

Beats go through the job's TCPStore, which torchrun (or `--nproc`) keeps outside of the ranks. Each rank watches the rank before it, so
that the traffic grows with the number of ranks only, and any set of dead ranks that is not all of them is found. A process that lives but
does not reach the next exchange is found by the number of its last exchange, the lowest.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from andromeda.utils.errors import AndromedaError

LOST_EXIT_CODE = 75
"""Exit code of all processes when one was lost (EX_TEMPFAIL of sysexits.h: trying again may succeed)."""
SILENT_AFTER = 15.0
"""Seconds without a beat after which a process counts as lost."""
INTERVAL = 1.0
"""Seconds between beats."""
# A store that outlives a restart by torchrun must not tell the new processes of the old ones' end.
PREFIX = f"andromeda/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/beat"
VERDICT = f"andromeda/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/lost"
ADVICE = "all processes end, and --resume continues the run"


class RankLost(AndromedaError):
    """Another process of the run died or hangs."""

    exit_code = LOST_EXIT_CODE


class Heartbeat:
    """Beats of this process, and a watch on the others, in a thread of its own."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._step, self._exchanges, self._progress = 0, 0, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat; call on all ranks at about the same time."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """The end of the run: nobody is missed any more."""
        if not self._ended.is_set():
            self._ended.set()
            self._beat(ended=True)

    def at(self, step: int) -> None:
        """The run is at `step`."""
        self._step = step

    def exchange(self) -> None:
        """Call before each exchange that all processes take part in."""
        self._exchanges, self._progress = self._exchanges + 1, time.monotonic()

    def wait_for_verdict(self) -> None:
        """Of a process whose exchange failed: wait until the one that was lost is named, which ends this process."""
        time.sleep(SILENT_AFTER + 5 * INTERVAL)

    def _beat(self, ended: bool = False) -> None:
        value = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._step,
            "exchanges": self._exchanges,
            "time": time.time(),
            "ended": ended,
        }
        self._store.set(f"{PREFIX}/{self._rank}", json.dumps(value))

    def _run(self) -> None:
        watched, changed = (self._rank - 1) % self._size, time.monotonic()
        seen: dict[str, Any] | None = None
        while not self._ended.wait(INTERVAL):
            try:
                self._beat()
                if self._store.check([VERDICT]):
                    verdict = json.loads(self._store.get(VERDICT))
                    self._end(verdict["sentence"], tell=self._rank == 0 and not verdict["told"])
                beat = read_beat(self._store, watched)
            except (RuntimeError, OSError) as error:
                if self._ended.is_set():
                    return
                self._end(f"The host that keeps the job's store is lost ({_first_line(error)}), after step {self._step}")
            now = time.monotonic()
            if beat != seen or (beat or {}).get("ended"):
                seen, changed = beat, now
            elif now - changed > SILENT_AFTER:
                self._accuse(watched, beat, f"has not answered for {now - changed:.0f} seconds")
            if now - self._progress > self._timeout:
                self._find_late(now)

    def _find_late(self, now: float) -> None:
        """Nobody has got on for `timeout` seconds: name the rank that is behind."""
        beats = {rank: read_beat(self._store, rank) for rank in range(self._size)}
        rank = min(beats, key=lambda rank: (beats[rank] or {}).get("exchanges", 0))
        self._accuse(rank, beats[rank], f"hangs, and nobody has got on for {now - self._progress:.0f} seconds")

    def _accuse(self, rank: int, beat: dict[str, Any] | None, what: str) -> None:
        beat = beat or {}
        sentence = f"Rank {rank} (host {beat.get('host', 'unknown')}, process {beat.get('pid', 'unknown')}) {what}"
        sentence += f", after step {beat.get('step', 0)}"
        give_verdict(self._store, sentence, told=self._rank == 0)
        self._end(sentence)

    def _end(self, sentence: str, tell: bool = True) -> None:
        """End this process at once: its main thread may wait for the lost one in a library, where no exception reaches it."""
        if self._ended.is_set():
            return
        if tell:
            print(f"andromeda: {sentence}: {ADVICE}.", file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)


def give_verdict(store: Any, sentence: str, *, told: bool) -> None:
    """End all ranks within seconds. told: the user was told, and no other process has to repeat the sentence."""
    store.set(VERDICT, json.dumps({"sentence": sentence, "told": told}))


def read_beat(store: Any, rank: int) -> dict[str, Any] | None:
    """The last beat of a rank, or None before its first."""
    key = f"{PREFIX}/{rank}"
    found: dict[str, Any] | None = json.loads(store.get(key)) if store.check([key]) else None
    return found


def last_step(store: Any, rank: int) -> int:
    """The last step that a rank has told of."""
    return int((read_beat(store, rank) or {}).get("step", 0))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:120]


def start_heartbeat(timeout: float) -> Heartbeat:
    """The heartbeat of this rank, over the store of the default process group."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):  # keys without prefixes, which `--nproc` reads too
        store = store.underlying_store
    # A connection of its own, which no exchange of the main thread can block.
    heartbeat = Heartbeat(store.clone() if hasattr(store, "clone") else store, dist.get_rank(), dist.get_world_size(), timeout)
    heartbeat.start()
    return heartbeat
