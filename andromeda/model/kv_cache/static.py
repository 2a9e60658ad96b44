"""A KV cache of fixed size: each token is kept at an index that the device holds.

Nothing about a decoding step depends on how many tokens there were before: no shape, no number on the host. So a step can be
recorded once as a CUDA graph and replayed; it writes one place of the cache and moves nothing. What is not filled yet comes
after the newest token and is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from andromeda.model.kv_cache.protocol import CacheContents, DecodeState, LayerContents, NoDecodeState

PADDING = -1
"""Document number below all others."""


class StaticKVCache:
    """State of `rows` sequences of at most `capacity` tokens, the one of the next pass included."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.length: Tensor = torch.zeros((), dtype=torch.long, device=device)
        self.index: Tensor = torch.zeros((), dtype=torch.long, device=device)
        self._last_position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._documents = torch.full((rows, capacity), PADDING, device=device)
        self._states: dict[int, StaticLayerKVCache] = {}

    def state(self, layer: int) -> DecodeState:
        """The state of layer number `layer` (-1: of the embedding)."""
        return self._states.setdefault(layer, StaticLayerKVCache(self.capacity, self.index))

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers of all keys (B, S) with those of this pass (B, 1) at its index."""
        assert documents is not None
        self._documents[:, self.index.reshape(1)] = documents
        return self._documents

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of the next token of each sequence (B, 1)."""
        return self._last_position + 1

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """Note that a pass over one token is complete."""
        self._last_position.copy_(positions)
        self.length += count
        # One pass too many must not write past the end.
        self.index.copy_(self.length.clamp(max=self.capacity - 1))

    def load(self, contents: CacheContents) -> None:
        """Continue from what another cache holds. A pass must have been made before, so that every layer has its buffers."""
        for layer, state in self._states.items():
            state.load(contents.layers[layer])
        self._documents.fill_(PADDING)[:, : contents.documents.shape[1]] = contents.documents
        self._last_position.copy_(contents.last_position)
        self.length.copy_(torch.as_tensor(contents.length))
        self.index.copy_(self.length)

    def contents(self) -> CacheContents:
        """All that it holds."""
        layers = {layer: LayerContents(state.buffers, state.recent) for layer, state in self._states.items()}
        return CacheContents(layers, self._documents, self._last_position, self.length)

    def reset_rows(self, rows: Tensor) -> None:
        """Set the sequences at the indices `rows` back to position 0: they have ended, and must not reach positions that do not exist."""
        self._last_position[rows] = 0

    def bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        held = [x for state in self._states.values() for x in (*state.buffers, *state.recent.values())]
        return sum(x.numel() * x.element_size() for x in held)


class StaticLayerKVCache(NoDecodeState):
    """State of one layer, in buffers that stay where they are."""

    static = True

    def __init__(self, capacity: int, index: Tensor) -> None:
        """index: where the token of a pass is kept, a number () on the device that its owner moves on."""
        self.capacity, self.index = capacity, index
        self.buffers: tuple[Tensor, ...] = ()
        self.recent: dict[str, Tensor] = {}

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, S, G, D), those of this pass (B, 1, G, D) at their index."""
        if not self.buffers:
            self.buffers = tuple(x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v))
        keys, values = self.buffers
        keys[:, self.index.reshape(1)] = k
        values[:, self.index.reshape(1)] = v
        return keys, values

    def get(self, slot: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """What the last pass put there, or zeros."""
        if slot not in self.recent:
            self.recent[slot] = super().get(slot, like, shape)
        return self.recent[slot].clone()

    def put(self, slot: str, value: Tensor) -> None:
        """Keep `value` (B, ...) for the next pass, where the last one was."""
        self.recent.setdefault(slot, torch.empty_like(value)).copy_(value)

    def load(self, contents: LayerContents) -> None:
        """Continue from what another cache's layer holds."""
        for buffer, held in zip(self.buffers, contents.buffers, strict=True):
            buffer.zero_()[:, : held.shape[1]] = held
        for slot, held in contents.recent.items():
            self.recent[slot].copy_(held)
