"""Sums between two log lines, kept on the device so that adding to them never waits; part of the checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Loss, bits and gradient norm of the steps since the last line."""

    def __init__(self, device: torch.device) -> None:
        # In float64 a sum goes to JSON and back without a rounding of its own.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps, self._targets, self._bytes = 0, 0, 0

    def add(self, nll: Tensor, norm: Tensor, targets: int, text: int) -> None:
        """A step that was taken: nll per target in nats and gradient norm, both (); its targets, and the bytes of text they stand for."""
        self._sums += torch.stack([nll.double() * targets, norm.double()])
        self._steps, self._targets, self._bytes = self._steps + 1, self._targets + targets, self._bytes + text

    def take(self) -> dict[str, float]:
        """The means, and a fresh start; nothing when no step was taken."""
        nll, norm = self._sums.tolist()
        steps, targets, text = self._steps, self._targets, self._bytes
        self._sums.zero_()
        self._steps, self._targets, self._bytes = 0, 0, 0
        if not steps:
            return {}
        means = {"loss": nll / max(1, targets), "gradient_norm": norm / steps}
        return means | ({"bits_per_byte": nll / math.log(2) / text} if text else {})

    def values(self) -> dict[str, Any]:
        """State, for JSON."""
        return {"sums": self._sums.tolist(), "steps": self._steps, "targets": self._targets, "bytes": self._bytes}

    def load(self, values: dict[str, Any]) -> None:
        """Take back what `values` gave."""
        self._sums.copy_(torch.tensor(values["sums"], dtype=torch.float64))
        self._steps, self._targets, self._bytes = values["steps"], values["targets"], values["bytes"]
