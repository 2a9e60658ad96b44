"""Decode state of one size: the newest token stands at the end, and every step moves all others one place to the front.

Nothing about a step then depends on how many there were before: no shape, no index, no number on the host. So a step can be
recorded once as a CUDA graph and replayed. What is not filled yet is padding on the left, a document of its own. The move
reads and writes the cache once more a step; a graph saves thousands of kernel launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from andromeda.model.cache import Contents, LayerContents, Nothing, State

PADDING = -1
"""Document number below all others."""


class RollingCache(Nothing):
    """State of `rows` sequences that sees `capacity` tokens, the one of the next pass included."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.length: Tensor = torch.zeros((), dtype=torch.long, device=device)
        self._last_position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._documents = torch.full((rows, capacity), PADDING, device=device)
        self._states: dict[int, RollingState] = {}

    def state(self, layer: int) -> State:
        """The state of layer number `layer` (-1: of the embedding)."""
        return self._states.setdefault(layer, RollingState(self.capacity))

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers of all keys (B, S) once those of this pass (B, 1) are the last."""
        assert documents is not None
        return push(self._documents, documents)

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of the next token of each sequence (B, 1)."""
        return self._last_position + 1

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """Take note that a pass over one token is complete; `documents` are the numbers of all keys."""
        assert documents is not None
        self._documents.copy_(documents)
        self._last_position.copy_(positions)
        self.length += count

    def load(self, contents: Contents) -> None:
        """Go on from what another cache holds. A pass must have been made before, so that every layer has its buffers."""
        for layer, state in self._states.items():
            state.load(contents.layers[layer])
        S = contents.documents.shape[1]
        self._documents.fill_(PADDING)[:, self.capacity - S :] = contents.documents
        self._last_position.copy_(contents.last_position)
        self.length.copy_(torch.as_tensor(contents.length))

    def contents(self) -> Contents:
        """All that it holds."""
        layers = {layer: LayerContents(state.buffers, state.recent) for layer, state in self._states.items()}
        return Contents(layers, self._documents, self._last_position, self.length)

    def restart(self, rows: Tensor) -> None:
        """Let the sequences at the indices `rows` begin anew: they are over, and must not reach positions that do not exist."""
        self._last_position[rows] = 0

    def bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        held = [x for state in self._states.values() for x in (*state.buffers, *state.recent.values())]
        return sum(x.numel() * x.element_size() for x in held)


class RollingState(State):
    """What one layer remembers, in buffers that stay where they are."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: tuple[Tensor, ...] = ()
        self.recent: dict[str, Tensor] = {}

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The last `capacity` keys and values (B, S, G, D), those of this pass (B, 1, G, D) at the end."""
        if not self.buffers:
            self.buffers = tuple(x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v))
        keys, values = (push(buffer, x) for buffer, x in zip(self.buffers, (k, v), strict=True))
        self.buffers[0].copy_(keys)
        self.buffers[1].copy_(values)
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
        """Go on from what another cache's layer holds."""
        for buffer, held in zip(self.buffers, contents.buffers, strict=True):
            buffer.zero_()[:, self.capacity - held.shape[1] :] = held
        for slot, held in contents.recent.items():
            self.recent[slot].copy_(held)


def push(queue: Tensor, newest: Tensor) -> Tensor:
    """queue (B, S, ...) with its first entry gone and `newest` (B, 1, ...) at the end."""
    return torch.cat([queue[:, 1:], newest.to(queue.dtype)], 1)
