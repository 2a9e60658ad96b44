"""One token further for every sequence of a batch: the plain way, and as a CUDA graph.

A decoding step is a thousand small kernels, and launching them takes a GPU's host many times longer than computing them.
Recorded once on a cache of one size, they are launched as one.

Shapes: B sequences still being written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.kv_cache.dynamic import DynamicKVCache, NoKVCache
from andromeda.model.kv_cache.static import StaticKVCache

ForwardLastLogits = Callable[[Tensor, Tensor | None, NoKVCache], Tensor]
"""Logits (B, V) at the last of ids (B, T) with document numbers (B, T), after what a cache holds."""

MIN_FREE_SLOTS = 256
"""Tokens that a recorded step has room for before it is recorded anew, at least."""


class DecodeStep(Protocol):
    """Writes on after a prompt has been read."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the tokens ids (B,)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences at the indices `rows` only."""
        ...

    def bytes(self) -> int:
        """Size of one sequence's share of the cache."""
        ...


class DynamicDecodeStep:
    """A forward pass with the cache that the prompt has filled; sequences that end leave it."""

    def __init__(self, read: ForwardLastLogits, cache: DynamicKVCache, rows: int, document: Tensor | None) -> None:
        """rows: sequences, B. document: number (B, 1) of the documents that are written, None where none were given."""
        self._read, self._cache, self._rows, self._document = read, cache, rows, document

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the tokens ids (B,)."""
        return self._read(ids[:, None], self._document, self._cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences at the indices `rows` only."""
        self._cache.select_rows(rows)
        self._rows = len(rows)
        self._document = None if self._document is None else self._document[rows]

    def bytes(self) -> int:
        """Size of one sequence's share of the cache."""
        return self._cache.bytes() // self._rows


class StaticDecodeStep:
    """A forward pass over tensors that stay where they are; sequences that end run on unseen, so that no shape changes."""

    def __init__(self, read: ForwardLastLogits, cache: DynamicKVCache, most: int) -> None:
        """most: tokens that any sequence may still be given."""
        contents = cache.contents()
        rows, device = contents.documents.shape[0], contents.documents.device
        self._read, self._most = read, most
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._document = contents.documents[:, -1:].clone()
        self._alive = torch.arange(rows, device=device)
        self._start(cache)

    def _start(self, past: DynamicKVCache | StaticKVCache) -> None:
        """Make a cache with room for more, and go on from what `past` holds."""
        contents = past.contents()
        rows, length = contents.documents.shape
        self._room = min(self._most, max(MIN_FREE_SLOTS, length))
        self._cache = StaticKVCache(rows, length + self._room, self._ids.device)
        self._prepare()
        self._cache.load(contents)

    def _prepare(self) -> None:
        """Passes over nothing, after which all buffers are there."""
        self._pass()

    def _pass(self) -> Tensor:
        return self._read(self._ids, self._document, self._cache)

    def _run(self) -> Tensor:
        return self._pass()

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the tokens ids (B,)."""
        if not self._room:
            self._start(self._cache)
        self._room, self._most = self._room - 1, self._most - 1
        self._ids[self._alive, 0] = ids
        return self._run()[self._alive]

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences at the indices `rows` only."""
        gone = torch.ones_like(self._alive, dtype=torch.bool)
        gone[rows] = False
        self._cache.reset_rows(self._alive[gone])
        self._alive = self._alive[rows]

    def bytes(self) -> int:
        """Size of one sequence's share of the cache."""
        return self._cache.bytes() // len(self._ids)


class CudaGraphDecodeStep(StaticDecodeStep):
    """The same pass, recorded as a CUDA graph and replayed."""

    def _prepare(self) -> None:
        # Kernels are compiled and libraries set up by the first passes, on a stream of their own as recording demands.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._pass()

    def _run(self) -> Tensor:
        self._graph.replay()
        return self._logits


def supports_cuda_graph(config: ModelConfig, device: torch.device) -> bool:
    """Whether a step of this model can be a CUDA graph: nothing in it may ask the device for a number.

    Experts do, and parts of a user's own may.
    """
    own = config.embedding.kind == "custom" or ":" in config.attention.mixer
    return device.type == "cuda" and config.feedforward.kind != "moe" and not own
