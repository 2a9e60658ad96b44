"""What a part may ask of a cache, and the cache of a forward pass over whole sequences, which remembers nothing.

Every layer has a `DecodeState`, which its parts call: `attend` (attention over all keys and values so far), `shift_state` (token
shift: the last few vectors), `get` and `put` (anything else, such as the sum of a recurrence). Without a cache, `NoKVCache`
answers the same calls, so parts never ask whether there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from andromeda.ops.attention import AttentionSpec

CoreAttention = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor]
"""q (B, T, H, D), k (B, S, G, D) and v (B, S, G, Dv) -> (B, T, H, Dv)."""


class CacheBytes(NamedTuple):
    """Size of a part's decode state for one sequence, in bytes."""

    per_token: int = 0
    """Grows with each token: keys and values."""
    per_sequence: int = 0
    """Does not grow: the state of a recurrence, the last vectors of a token shift."""


@dataclass(frozen=True)
class LayerContents:
    """The state of one layer."""

    buffers: tuple[Tensor, ...]
    """Keys and values (B, S, G, D) of all tokens seen."""
    recent: dict[str, Tensor]
    """What was put into each slot (B, ...)."""


@dataclass(frozen=True)
class CacheContents:
    """All that a cache holds, for another kind of cache to continue from."""

    layers: dict[int, LayerContents]
    documents: Tensor
    """Document numbers (B, S) of all tokens seen; zeros where none were given."""
    last_position: Tensor
    """(B, 1), or (1, 1) where all rows are alike."""
    length: int | Tensor
    """Tokens seen."""


class DecodeState(Protocol):
    """State of one layer."""

    @property
    def static(self) -> bool:
        """Whether the buffers keep their place and size, as kernels that write into them need."""
        ...

    @property
    def exchanges(self) -> bool:
        """Whether what comes before the tokens of a pass is computed within the pass, by other processes."""
        ...

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values (B, S, G, D), once there are any."""
        ...

    @property
    def recent(self) -> dict[str, Tensor]:
        """What was put into each slot (B, ...)."""
        ...

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, T, G, D); returns all keys and values (B, S, G, D) so far."""
        ...

    def attend(self, compute: CoreAttention, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Append k, v (B, T, G, D) and let q (B, T, H, D) attend to all so far: (B, T, H, Dv)."""
        ...

    def get(self, slot: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """What the last pass put there; before the first token zeros of this shape (B, ...), dtype and device as `like`."""
        ...

    def put(self, slot: str, value: Tensor) -> None:
        """Keep `value` (B, ...) for the next pass; `slot` tells the parts of one layer apart."""
        ...

    def shift_state(self, slot: str, x: Tensor, count: int) -> Tensor:
        """The `count` vectors (B, count, C) before x (B, T, C), zeros before the first token; keeps x's own last ones."""
        ...


class KVCache(Protocol):
    """State of all layers."""

    @property
    def length(self) -> int | Tensor:
        """Tokens seen: a number, () on the device, or (B, 1) where sequences differ."""
        ...

    @property
    def index(self) -> Tensor | None:
        """Where the token of a pass is kept among the keys, a number () on the device; None is behind all others."""
        ...

    def state(self, layer: int) -> DecodeState:
        """The state of layer number `layer` (-1: of the embedding)."""
        ...

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers (B, S) of all keys, those of this pass (B, T) included."""
        ...

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token since its document began: (B, T), or (1, T) without documents."""
        ...

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """Note that a pass over `count` tokens is complete; `documents` are the numbers of all keys."""
        ...


class NoDecodeState:
    """State of one layer in a pass over whole sequences: none. Also what the states of caches share."""

    static: bool = False
    exchanges: bool = False

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.recent: dict[str, Tensor] = {}

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of this pass."""
        return k, v

    def attend(self, compute: CoreAttention, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Append k, v (B, T, G, D) and let q (B, T, H, D) attend to all so far: (B, T, H, Dv)."""
        return compute(q, *self.update(k, v), spec)

    def get(self, slot: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Zeros of this shape, dtype and device as `like`."""
        return like.new_zeros(shape)

    def put(self, slot: str, value: Tensor) -> None:
        """Drop it."""

    def shift_state(self, slot: str, x: Tensor, count: int) -> Tensor:
        """The `count` vectors (B, count, C) before x (B, T, C), zeros before the first token; keeps x's own last ones."""
        past = self.get(slot, x, (x.shape[0], count, x.shape[2]))
        self.put(slot, torch.cat([past, x[:, -count:]], 1)[:, -count:])
        return past


class NoKVCache:
    """The cache of a forward pass over whole sequences."""

    length: int = 0
    index: Tensor | None = None

    def __init__(self) -> None:
        self._state = NoDecodeState()

    def state(self, layer: int) -> NoDecodeState:
        """The same empty state for every layer."""
        return self._state

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Those of this pass."""
        return documents

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token since its document began: (B, T), or (1, T) without documents."""
        return document_positions(shape, documents, device)

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """There is nothing to note."""


def document_positions(shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token since its document began; a document is a run of equal numbers. (B, T), (1, T) without documents."""
    index = torch.arange(shape[1], device=device)[None]
    if documents is None:
        return index
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values
