"""Loss spikes: which steps are bad, and what happens then.

A bad step (loss or gradient norm not finite, or a norm far above the recent median) is skipped: the weights stay as they are. Several
bad steps in a row may mean that the weights themselves are damaged: the run rolls back to its last healthy checkpoint and skips the
rows of these steps. PaLM was trained this way (arXiv 2204.02311, section 5.1): the spikes did not recur when the same checkpoint was
trained on other batches.

The guard's state is plain numbers, so that it is part of the checkpoint.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from andromeda.config.train import SpikeGuardConfig

MIN_HISTORY = 8
"""Gradient norms that must be known before one can be called a spike."""

RowRange = tuple[int, int]
"""Rows of the stream, [first, end)."""


class LossSpikeGuard:
    """Checks every step against those before it."""

    def __init__(self, config: SpikeGuardConfig) -> None:
        self._config = config
        self._norms: list[float] = []
        self._bad_rows: list[RowRange] = []
        """Rows of the bad steps since the last good one."""
        self.rollbacks = 0
        self.skipped_rows: list[RowRange] = []
        """Rows that the run skips after rollbacks, in order."""

    @property
    def enabled(self) -> bool:
        """Whether steps are checked at all."""
        return self._config.enabled

    @property
    def healthy(self) -> bool:
        """Whether the last step was good."""
        return not self._bad_rows

    @property
    def must_roll_back(self) -> bool:
        """Whether `patience` steps in a row were bad."""
        return len(self._bad_rows) >= self._config.patience

    @property
    def out_of_rollbacks(self) -> bool:
        """Whether the run has rolled back as often as it may."""
        return self.rollbacks >= self._config.rollbacks

    def check(self, loss: float, norm: float, rows: RowRange) -> str | None:
        """Why the step over `rows` with this loss and gradient norm is bad, or None; call once for every step."""
        reason = self._reason(loss, norm) if self._config.enabled else None
        if reason is None:
            self._bad_rows = []
            self._norms = [*self._norms, norm][-self._config.history :]
        else:
            self._bad_rows.append(rows)
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if len(self._norms) >= min(MIN_HISTORY, self._config.history):
            median = statistics.median(self._norms)
            if norm > self._config.spike * median > 0.0:
                return f"the gradient norm {norm:.4g} is more than {self._config.spike:g} times the median {median:.4g}"
        return None

    def next_row(self, row: int) -> int:
        """The first row from `row` on that is not skipped."""
        for first, end in self.skipped_rows:
            if first <= row < end:
                row = end
        return row

    def after_rollback(self) -> tuple[int, list[RowRange]]:
        """What a rollback must not undo: the number of rollbacks, this one included, and the rows to skip."""
        return self.rollbacks + 1, sorted([*self.skipped_rows, *self._bad_rows])

    def state_dict(self) -> dict[str, Any]:
        """State, for JSON."""
        return {"norms": self._norms, "suspects": self._bad_rows, "rollbacks": self.rollbacks, "skips": self.skipped_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._norms, self.rollbacks = list(state["norms"]), int(state["rollbacks"])
        self._bad_rows = [(first, end) for first, end in state["suspects"]]
        self.skipped_rows = [(first, end) for first, end in state["skips"]]
