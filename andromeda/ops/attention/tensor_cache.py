"""A cache of values derived from tensors, such as masks from document numbers, which all layers of a model share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

Value = TypeVar("Value")


class TensorCache(Generic[Value]):
    """The last few values that were computed from some tensors and a key.

    Tensors are compared by identity and version counter (`Tensor._version`), without reading them on the device. Nothing is
    cached while torch.compile traces or a CUDA graph is captured: there the value would become a constant, whose memory is freed
    before the graph is replayed.
    """

    def __init__(self, size: int) -> None:
        self._entries: deque[tuple[tuple[tuple[ref[Tensor], int], ...], Hashable, Value]] = deque(maxlen=size)

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Value]) -> Value:
        """The cached value for these very tensors and this key, or the result of `make()`, which is then cached."""
        if not _is_cacheable(tensors):
            return make()
        full_key = _full_key(tensors, key)
        for marks, known, value in self._entries:
            if known == full_key and all(r() is t and n == t._version for (r, n), t in zip(marks, tensors, strict=True)):
                return value
        value = make()
        self.put(tensors, key, value)
        return value

    def put(self, tensors: tuple[Tensor, ...], key: Hashable, value: Value) -> None:
        """Cache a value that the caller knows already, so that `get` need not compute it."""
        if _is_cacheable(tensors):
            self._entries.append((tuple((ref(t), t._version) for t in tensors), _full_key(tensors, key), value))


def _is_cacheable(tensors: tuple[Tensor, ...]) -> bool:
    """Inference tensors have no version counter, so that a cached value could be outdated."""
    return not (torch.compiler.is_compiling() or _is_capturing() or any(t.is_inference() for t in tensors))


def _full_key(tensors: tuple[Tensor, ...], key: Hashable) -> Hashable:
    """A tensor created in inference mode cannot be saved for backward, so that training needs its own entry."""
    return len(tensors), torch.is_inference_mode_enabled(), key


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
