"""Bad steps: what counts as one, and what follows. Plain numbers only, so that the guard is part of the checkpoint.

A bad step (loss or norm not finite, or a norm far above the recent median) is not taken: the weights stay. Several in a
row mean that the weights themselves may be spoilt: the run goes back to its last healthy checkpoint and passes over the
rows that did it. PaLM was trained this way (arXiv 2204.02311, section 5.1): spikes did not come back when the same
checkpoint went on with other batches.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from andromeda.config.train import SpikeGuardConfig

MINIMUM = 8
"""Norms that must be known before one can be called a spike."""

Span = tuple[int, int]
"""Rows of the stream, [first, end)."""


class BadSteps:
    """Judges steps and remembers enough to judge the next."""

    def __init__(self, config: SpikeGuardConfig) -> None:
        self._config = config
        self._norms: list[float] = []
        self._suspects: list[Span] = []
        self.rollbacks = 0
        self.skips: list[Span] = []
        """Rows that are passed over, in order."""

    @property
    def enabled(self) -> bool:
        """Whether steps are judged at all."""
        return self._config.enabled

    @property
    def healthy(self) -> bool:
        """Whether the last step was good."""
        return not self._suspects

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were bad that the run must go back."""
        return len(self._suspects) >= self._config.patience

    @property
    def gives_up(self) -> bool:
        """Whether it has gone back too often for going back to help."""
        return self.rollbacks >= self._config.rollbacks

    def judge(self, loss: float, norm: float, rows: Span) -> str | None:
        """Why the step over `rows` with this loss and gradient norm is bad, or None; call once for every step."""
        reason = self._reason(loss, norm) if self._config.enabled else None
        if reason is None:
            self._suspects = []
            self._norms = [*self._norms, norm][-self._config.history :]
        else:
            self._suspects.append(rows)
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if len(self._norms) >= min(MINIMUM, self._config.history):
            median = statistics.median(self._norms)
            if norm > self._config.spike * median > 0.0:
                return f"the gradient norm {norm:.4g} is more than {self._config.spike:g} times the median {median:.4g}"
        return None

    def next_row(self, row: int) -> int:
        """The first row from `row` on that is not passed over."""
        for first, end in self.skips:
            if first <= row < end:
                row = end
        return row

    def pass_over(self) -> tuple[int, list[Span]]:
        """What must outlive going back to a checkpoint: the number of times, this one included, and the rows to pass over."""
        return self.rollbacks + 1, sorted([*self.skips, *self._suspects])

    def values(self) -> dict[str, Any]:
        """State, for JSON."""
        return {"norms": self._norms, "suspects": self._suspects, "rollbacks": self.rollbacks, "skips": self.skips}

    def load(self, values: dict[str, Any]) -> None:
        """Take back what `values` gave."""
        self._norms, self.rollbacks = list(values["norms"]), int(values["rollbacks"])
        self._suspects = [(first, end) for first, end in values["suspects"]]
        self.skips = [(first, end) for first, end in values["skips"]]
