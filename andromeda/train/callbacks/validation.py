"""Loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from andromeda.data.loader import TokenStream
from andromeda.train.objective import Rows, Sums
from andromeda.train.precision import Precision

ROWS = "spread"
"""Which held-out rows are measured, as checkpoints keep it: those of older versions were the first ones, and keep nothing."""


class NoValidation:
    """Off: nothing needs to be held out."""

    def __call__(self, model: nn.Module, objective: Callable[[Rows, int], Sums], precision: Precision) -> dict[str, float]:
        """Nothing."""
        return {}


class Validation(NoValidation):
    """Rows that lie evenly over the held-out stream, the same at every call.

    Not its first: a long document or two would be all that is measured.
    """

    def __init__(self, stream: TokenStream, tokens: int, sequence: int, rows_at_once: int, document_mask: bool) -> None:
        self._stream, self._mask, self._at_once = stream, document_mask, rows_at_once
        available = stream.num_sequences or 0
        count = min(max(1, tokens // sequence), available)
        self._rows = [i * available // count for i in range(count)]

    @torch.no_grad()
    def __call__(self, model: nn.Module, objective: Callable[[Rows, int], Sums], precision: Precision) -> dict[str, float]:
        """Loss in nats per token and bits per byte of text; nothing when nothing is held out."""
        nll = torch.zeros((), dtype=torch.float64, device=precision.device)
        targets, text = 0, 0
        model.eval()
        for start in range(0, len(self._rows), self._at_once):
            batch = self._stream.gather(self._rows[start : start + self._at_once])
            with precision.autocast():
                nll += objective(Rows.of(batch, self._mask).to(precision.device), 0).nll
            targets, text = targets + batch.tokens, text + batch.bytes
        model.train()
        if not targets:
            return {}
        figures = {"validation/loss": float(nll) / targets}
        return figures | ({"validation/bits_per_byte": float(nll) / math.log(2) / text} if text else {})
