"""One decoding step for all sequences of a batch: eager with a dynamic KV cache, or as a CUDA graph with a static one.

A decoding step is a thousand small kernels, and launching them takes the host many times longer than the GPU takes to compute
them. Captured once on a static KV cache, they are launched as one.

Shapes: B active sequences, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.kv_cache.static import StaticKVCache
from andromeda.model.transformer import Transformer
from andromeda.utils.log import get_logger

log = get_logger(__name__)

ForwardLastLogits = Callable[[Tensor, Tensor | None, KVCache], Tensor]
"""Logits (B, V) at the last position of ids (B, T) with document numbers (B, T), after the contents of a KV cache."""

MIN_FREE_SLOTS = 256
"""Least free slots of a static KV cache: a step is captured again when they are used up."""


class DecodeStep(Protocol):
    """Decodes one token at a time after the prefill."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the tokens ids (B,)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences at the indices `rows`."""
        ...

    def bytes(self) -> int:
        """Bytes of the KV cache per sequence."""
        ...


class DynamicDecodeStep:
    """A forward pass with the dynamic KV cache of the prefill; finished sequences are removed from it."""

    def __init__(self, read: ForwardLastLogits, cache: DynamicKVCache, rows: int, document: Tensor | None) -> None:
        """rows: sequences, B. document: their document numbers (B, 1), None without documents."""
        self._read, self._cache, self._rows, self._document = read, cache, rows, document

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the tokens ids (B,)."""
        return self._read(ids[:, None], self._document, self._cache)

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences at the indices `rows`."""
        self._cache.select_rows(rows)
        self._rows = len(rows)
        self._document = None if self._document is None else self._document[rows]

    def bytes(self) -> int:
        """Bytes of the KV cache per sequence."""
        return self._cache.bytes() // self._rows


class StaticDecodeStep:
    """A forward pass over static tensors; finished sequences are still computed and ignored, so that no shape changes."""

    def __init__(self, read: ForwardLastLogits, cache: DynamicKVCache, most: int) -> None:
        """most: most tokens that any sequence may still generate."""
        contents = cache.contents()
        rows, device = contents.documents.shape[0], contents.documents.device
        self._read, self._most = read, most
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._document = contents.documents[:, -1:].clone()
        self._alive = torch.arange(rows, device=device)
        self._start(cache)

    def _start(self, past: DynamicKVCache | StaticKVCache) -> None:
        """Allocate a cache with free slots, and copy the contents of `past` into it."""
        contents = past.contents()
        rows, length = contents.documents.shape
        self._room = min(self._most, max(MIN_FREE_SLOTS, length))
        self._cache = StaticKVCache(rows, length + self._room, self._ids.device)
        self._prepare()
        self._cache.load(contents)

    def _prepare(self) -> None:
        """A pass over an empty cache, which allocates all buffers."""
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
        """Keep only the sequences at the indices `rows`."""
        gone = torch.ones_like(self._alive, dtype=torch.bool)
        gone[rows] = False
        self._cache.reset_rows(self._alive[gone])
        self._alive = self._alive[rows]

    def bytes(self) -> int:
        """Bytes of the KV cache per sequence."""
        return self._cache.bytes() // len(self._ids)


class CudaGraphDecodeStep(StaticDecodeStep):
    """The same pass, captured as a CUDA graph and replayed."""

    def _prepare(self) -> None:
        # Warm-up: the first passes compile kernels and initialize libraries, on a side stream as capturing requires.
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


def supports_cuda_graph(model: Transformer, device: torch.device) -> bool:
    """Whether a step of this model can be a CUDA graph: nothing in it may synchronize with the device, and all state must be in the
    cache's slots. Token mixers, networks and embeddings say so by `supports_cuda_graph`; those that do not say it are taken not to."""
    if device.type != "cuda":
        return False
    if model.without_cuda_graph:
        log.info("Decoding without a CUDA graph: %s does not support one.", " and ".join(model.without_cuda_graph))
    return not model.without_cuda_graph
