"""What an attention call computes, as one value that every backend reads.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query sees, and what is added to the logits.

    Query t stands at key index t + (S - T): queries are the last T of the S keys, as in cached decoding. With
    distance d = that index - key index, the logit of a pair is

        softcap(scale * <q, k>) - slope * d        softcap(z) = cap * tanh(z / cap), or z when cap is 0

    and minus infinity where d < 0, or d >= window, or the documents differ.
    """

    scale: float
    window: int = 0
    """Tokens that a query sees, itself included; 0 is all."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers of the queries (B, T) and of the keys (B, S), which never fall along a row; None is one document.

    What backends derive from them is kept as long as a later call brings the same tensors, unchanged in place.
    """
    slopes: Tensor | None = None
    """ALiBi slope of each query head (H,), in float32 or wider; None is no bias."""
    softcap: float = 0.0
    index: Tensor | None = None
    """Index of the one query among the keys, a number () on the device, where it is not that of the last: a cache of one size may have
    room behind it, which is not seen."""

    @property
    def plain(self) -> bool:
        """Causal and nothing else, as any attention kernel can compute it."""
        return not self.window and self.documents is None and self.slopes is None and not self.softcap and self.index is None

    def distance(self, T: int, S: int, device: torch.device) -> Tensor:
        """Distance of each query to each key (T, S), negative for keys to come."""
        queries_T = torch.arange(S - T, S, device=device) if self.index is None else self.index.reshape(1)
        return queries_T[:, None] - torch.arange(S, device=device)

    def visible(self, T: int, S: int, device: torch.device) -> Tensor:
        """Which keys each query sees: (T, S), or (B, 1, T, S) with documents."""
        distance_TS = self.distance(T, S, device)
        seen = distance_TS >= 0
        if self.window:
            seen = seen & (distance_TS < self.window)
        if self.documents is None:
            return seen
        queries_BT, keys_BS = self.documents
        return seen & (queries_BT[:, None, :, None] == keys_BS[:, None, None, :])

    def bias(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """ALiBi's addition to the logits (H, T, S), or None."""
        if self.slopes is None:
            return None
        return -self.slopes.to(device)[:, None, None] * self.distance(T, S, device)

    def trimmed(self, T: int, S: int) -> tuple[AttentionSpec, int]:
        """The same attention over the keys from the returned index on: what no query's window reaches is left out.

        A window that then covers every key is no window, so that decoding one token in a window is plain attention.
        """
        if not self.window or self.index is not None:
            return self, 0
        first = max(0, S - T - self.window + 1)
        documents = self.documents and (self.documents[0], self.documents[1][:, first:])
        return replace(self, window=0 if self.window >= S - first else self.window, documents=documents), first
