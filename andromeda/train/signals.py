"""Ctrl-C and SIGTERM end a run after the step that it is in. A second Ctrl-C ends it at once; the last checkpoint stays."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalHandler:
    """Remembers the first signal in `received`, a number of `signal`, for the training loop to ask after each step."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM within the block. A second SIGINT raises KeyboardInterrupt. Outside of the main thread, where Python
        sets no handlers, nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def signal_name(number: int) -> str:
        """What a signal is called in messages."""
        return {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGPIPE: "the end of its output's reader (SIGPIPE)"}[
            signal.Signals(number)
        ]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
