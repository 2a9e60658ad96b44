"""Decode state: what each part remembers of the tokens before, so that a forward pass can go on where the last one ended.

A part that has state owns a slot name, given to it when the model is built, and calls one of two methods:
`extend` (attention: all keys and values so far) or `recall` (token shift: the last few vectors). Without a cache,
`Nothing` answers the same calls, so parts never ask whether there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Nothing:
    """The identity cache of a forward pass over whole sequences."""

    length = 0

    def extend(self, slot: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they came."""
        return k, v

    def recall(self, slot: str, x: Tensor, count: int) -> Tensor:
        """Zeros (B, count, C): before the first token there is nothing."""
        return x.new_zeros(x.shape[0], count, x.shape[2])

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers of all keys: those of this pass."""
        return documents

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token since its document began (B, T)."""
        return document_positions(shape, documents, device)

    def advance(self, ids: Tensor, positions: Tensor, documents: Tensor | None) -> None:
        """Nothing to remember."""


class Cache:
    """Keys, values, shifted vectors and document numbers of the tokens seen so far, for B sequences.

    Buffers double when they are full, so that T tokens cost O(T) copies in all; `capacity` reserves room beforehand.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self._capacity = capacity
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._recent: dict[str, Tensor] = {}
        self._documents: Tensor | None = None
        self._last_position: Tensor | None = None

    def extend(self, slot: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, T, G, D) and return all of them (B, S, G, D), S = length + T."""
        end = self.length + k.shape[1]
        if slot not in self._buffers or self._buffers[slot][0].shape[1] < end:
            self._grow(slot, k, v, end)
        keys, values = self._buffers[slot]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]

    def _grow(self, slot: str, k: Tensor, v: Tensor, end: int) -> None:
        size = max(end, self._capacity, 2 * self.length)
        grown = tuple(x.new_empty(x.shape[0], size, *x.shape[2:]) for x in (k, v))
        for new, old in zip(grown, self._buffers.get(slot, ()), strict=False):
            new[:, : self.length] = old[:, : self.length]
        self._buffers[slot] = (grown[0], grown[1])

    def recall(self, slot: str, x: Tensor, count: int) -> Tensor:
        """The `count` vectors (B, count, C) before x (B, T, C); keeps x's own last ones for the next call."""
        past = self._recent.get(slot)
        if past is None:
            past = x.new_zeros(x.shape[0], count, x.shape[2])
        self._recent[slot] = torch.cat([past, x], 1)[:, -count:].detach()
        return past

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers of all keys (B, S): the past ones and those of this pass."""
        if self.length == 0 or documents is None:
            return documents
        if self._documents is None:
            raise ValueError("a cache filled without document numbers cannot go on with them")
        return torch.cat([self._documents, documents], 1)

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token since its document began (B, T), counting the tokens of earlier passes."""
        positions = document_positions(shape, documents, device)
        if self._last_position is None:
            return positions
        goes_on: Tensor | bool = True
        if documents is not None and self._documents is not None:
            # Only the tokens of the document that the last pass ended in go on counting.
            goes_on = (documents == self._documents[:, -1:]) & (documents == documents[:, :1])
        return positions + torch.where(torch.as_tensor(goes_on, device=device), self._last_position + 1, 0)

    def advance(self, ids: Tensor, positions: Tensor, documents: Tensor | None) -> None:
        """Take note that the pass over ids (B, T) is complete."""
        self._documents = self.documents(documents)
        self._last_position = positions[:, -1:]
        self.length += ids.shape[1]

    def bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        held = [x for pair in self._buffers.values() for x in pair] + list(self._recent.values())
        return sum(x.numel() * x.element_size() for x in held)


def document_positions(shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token since its document began (B, T); a document is a run of equal numbers."""
    index = torch.arange(shape[1], device=device).expand(shape[0], -1)
    if documents is None:
        return index
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values
