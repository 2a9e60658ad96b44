"""A KV cache that grows: any number of tokens a pass, and sequences that leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.model.kv_cache.protocol import CacheContents, DecodeState, LayerContents, NoDecodeState, document_positions


@dataclass(frozen=True)
class CacheCheckpoint:
    """A place in a sequence that `DynamicKVCache.rollback` returns to."""

    length: int
    documents: Tensor | None
    last_position: Tensor | None
    recent: dict[int, dict[str, Tensor]]


class DynamicKVCache:
    """The state of all layers, and the document numbers and positions of the tokens seen so far, for B sequences.

    Buffers double when they are full, so that T tokens cost O(T) copies in all; `capacity` reserves room beforehand.
    """

    index: Tensor | None = None

    def __init__(self, capacity: int = 0) -> None:
        self.length: int = 0
        self.capacity = capacity
        self._states: dict[int, LayerKVCache] = {}
        self._documents: Tensor | None = None
        self._last_position: Tensor | None = None

    def state(self, layer: int) -> DecodeState:
        """The state of layer number `layer` (-1: of the embedding)."""
        return self._states.setdefault(layer, LayerKVCache(self))

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers of all keys (B, S): the past ones and those of this pass."""
        if not self.length:
            return documents
        if (documents is None) != (self._documents is None):
            raise ValueError("every pass through a cache has document numbers, or none has")
        return None if documents is None or self._documents is None else torch.cat([self._documents, documents], 1)

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token since its document began (B, T), or (1, T) without documents, counting earlier passes."""
        positions = document_positions(shape, documents, device)
        if self._last_position is None:
            return positions
        if documents is None or self._documents is None:
            return positions + self._last_position + 1
        # Only the document that the last pass ended in continues to count.
        return positions + (documents == self._documents[:, -1:]) * (self._last_position + 1)

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """Note that a pass over `count` tokens is complete; `documents` are the numbers of all keys."""
        self._documents, self._last_position = documents, positions[:, -1:]
        self.length += count

    def select_rows(self, rows: Tensor) -> None:
        """Keep only the sequences at the indices `rows` (n,), in that order."""
        for state in self._states.values():
            state.select_rows(rows)
        self._documents = None if self._documents is None else self._documents[rows]
        if self._last_position is not None and self._documents is not None:
            self._last_position = self._last_position[rows]

    def checkpoint(self) -> CacheCheckpoint:
        """The current place, for `rollback`. Copies nothing: keys and values stay where they are."""
        recent = {layer: dict(state.recent) for layer, state in self._states.items()}
        return CacheCheckpoint(self.length, self._documents, self._last_position, recent)

    def rollback(self, checkpoint: CacheCheckpoint) -> None:
        """Drop all tokens after `checkpoint`, so that another continuation of the same prompt can be read."""
        self.length, self._documents, self._last_position = checkpoint.length, checkpoint.documents, checkpoint.last_position
        for layer, state in self._states.items():
            state.recent = dict(checkpoint.recent.get(layer, {}))

    def contents(self) -> CacheContents:
        """All that it holds. Raises ValueError when it has seen nothing yet."""
        if self._last_position is None or not self._states:
            raise ValueError("a cache that has seen no token has no contents")
        layers = {
            layer: LayerContents(tuple(x[:, : self.length] for x in state.buffers), state.recent) for layer, state in self._states.items()
        }
        documents = self._documents
        if documents is None:
            x = next(x for state in self._states.values() for x in (*state.buffers, *state.recent.values()))
            documents = torch.zeros(x.shape[0], self.length, dtype=torch.long, device=x.device)
        return CacheContents(layers, documents, self._last_position, self.length)

    def bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        held = [x for state in self._states.values() for x in (*state.buffers, *state.recent.values())]
        return sum(x.numel() * x.element_size() for x in held)


class LayerKVCache(NoDecodeState):
    """State of one layer: keys and values in buffers that double, and named slots."""

    def __init__(self, cache: DynamicKVCache) -> None:
        self.cache = cache
        self.buffers: tuple[Tensor, ...] = ()
        self.recent: dict[str, Tensor] = {}

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, T, G, D) and return all of them (B, S, G, D), S = length + T."""
        start = self.cache.length
        end = start + k.shape[1]
        if not self.buffers or self.buffers[0].shape[1] < end:
            self._grow(start, end, k, v)
        keys, values = self.buffers
        keys[:, start:end] = k
        values[:, start:end] = v
        return keys[:, :end], values[:, :end]

    def _grow(self, start: int, end: int, *given: Tensor) -> None:
        size = max(end, self.cache.capacity, 2 * start)
        grown = tuple(x.new_empty(x.shape[0], size, *x.shape[2:]) for x in given)
        for new, old in zip(grown, self.buffers, strict=False):
            new[:, :start] = old[:, :start]
        self.buffers = grown

    def get(self, slot: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """What the last pass put there, or zeros."""
        return self.recent[slot] if slot in self.recent else super().get(slot, like, shape)

    def put(self, slot: str, value: Tensor) -> None:
        """Keep `value` (B, ...) for the next pass."""
        self.recent[slot] = value.detach()

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these sequences."""
        self.buffers = tuple(x[rows] for x in self.buffers)
        self.recent = {slot: x[rows] for slot, x in self.recent.items()}
