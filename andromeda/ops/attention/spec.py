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

    Query t is at key index t + (S - T): queries are the last T of the S keys, as in cached decoding. With the distance
    d = that index - key index, the logit of a pair is

        softcap(scale * <q, k>) - slope * d        softcap(z) = cap * tanh(z / cap), or z when cap is 0

    and minus infinity where d < 0, or d >= window, or the documents differ.
    """

    scale: float
    window: int = 0
    """Sliding window: tokens that a query sees, itself included; 0 for all."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers of the queries (B, T) and of the keys (B, S), non-decreasing along a sequence; None is one document.

    What backends derive from them is cached for later calls with the same tensors, if they were not modified in place.
    """
    slopes: Tensor | None = None
    """ALiBi slope of each query head (H,), in float32 or wider; None is no bias."""
    softcap: float = 0.0
    query_index: Tensor | None = None
    """Index of the only query among the keys, () on the device, if it is not at the last key: a static KV cache may have unused
    slots after it, which are not visible."""

    @property
    def is_plain_causal(self) -> bool:
        """Whether this is causal attention and nothing else, which every attention kernel can compute."""
        return not self.window and self.documents is None and self.slopes is None and not self.softcap and self.query_index is None

    def with_documents(self, documents: tuple[Tensor, Tensor] | None) -> AttentionSpec:
        """The same with other document numbers."""
        return replace(self, documents=documents)

    def distance(self, T: int, S: int, device: torch.device) -> Tensor:
        """Distance of each query to each key (T, S), negative for later keys."""
        queries_T = torch.arange(S - T, S, device=device) if self.query_index is None else self.query_index.reshape(1)
        return queries_T[:, None] - torch.arange(S, device=device)

    def mask(self, T: int, S: int, device: torch.device) -> Tensor:
        """Which keys each query sees, a bool mask (T, S), or (B, 1, T, S) with documents."""
        distance_TS = self.distance(T, S, device)
        seen = distance_TS >= 0
        if self.window:
            seen = seen & (distance_TS < self.window)
        if self.documents is None:
            return seen
        queries_BT, keys_BS = self.documents
        return seen & (queries_BT[:, None, :, None] == keys_BS[:, None, None, :])

    def bias(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """ALiBi's bias on the logits (H, T, S), or None."""
        if self.slopes is None:
            return None
        return -self.slopes.to(device)[:, None, None] * self.distance(T, S, device)

    def crop_to_window(self, T: int, S: int) -> tuple[AttentionSpec, int]:
        """The spec without the keys before the returned index, which are outside of every query's window.

        A window that then covers all keys is removed, so that decoding one token with a window is plain causal attention.
        """
        if not self.window or self.query_index is not None:
            return self, 0
        first = max(0, S - T - self.window + 1)
        documents = self.documents and (self.documents[0], self.documents[1][:, first:])
        return replace(self, window=0 if self.window >= S - first else self.window, documents=documents), first
