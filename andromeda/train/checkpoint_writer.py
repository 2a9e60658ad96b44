"""Checkpoints of a run in progress: written at once, or in the background from a copy in main memory."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

from andromeda.train import checkpoint
from andromeda.train.checkpoint import Snapshot
from andromeda.train.checkpoint_chunks import local_chunks
from andromeda.train.checkpoint_ranks import ONE, Ranks


class CheckpointWriter:
    """Writes the checkpoints of one run into `folder` and prunes older ones. Every rank has one and calls it at the same steps.

    background: `save` returns when the state is copied to main memory. `ranks` must then have a process group of its own: the thread
    and the training would otherwise wait for each other's messages.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ONE, *, background: bool = False) -> None:
        self._folder, self._keep, self._ranks, self._background = folder, keep, ranks, background
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Write the state, once an earlier one is on the disk. Raises CheckpointError, also for what went wrong with the earlier one."""
        self.wait()
        tensors = local_chunks(snapshot.tensors, copy=self._background)

        def write() -> None:
            checkpoint.write(self._folder, snapshot.step, snapshot.metadata, tensors, self._ranks)
            self._ranks.on_first(lambda: checkpoint.prune(self._folder, self._keep))

        if not self._background:
            write()
            return

        def guarded() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        # A daemon: where training ends with an error, other ranks may never come to write their part.
        self._thread = Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no checkpoint is being written. Raises CheckpointError where the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
