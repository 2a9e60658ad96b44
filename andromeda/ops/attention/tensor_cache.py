"""What is computed once for a tensor and used by every layer after it: masks and boundaries made from document numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

Value = TypeVar("Value")


class TensorCache(Generic[Value]):
    """The last few values that were made from some tensors and a key.

    Tensors are known by identity and by their count of changes in place, so that nothing is compared on the device and
    nothing waits for it. Nothing is remembered while torch.compile traces, nor while a CUDA graph is recorded: it would be
    a constant there, and its memory would be gone when the graph is replayed.
    """

    def __init__(self, size: int) -> None:
        self._entries: deque[tuple[tuple[tuple[ref[Tensor], int], ...], Hashable, Value]] = deque(maxlen=size)

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Value]) -> Value:
        """The value made before for these very tensors and this key, or the one that `make` makes now."""
        # Inference tensors do not count their changes, so that nobody could tell whether a value is still true.
        if torch.compiler.is_compiling() or _is_capturing() or any(t.is_inference() for t in tensors):
            return make()
        # What inference mode makes cannot be kept for a backward pass, so that a training step needs one of its own.
        key = (len(tensors), torch.is_inference_mode_enabled(), key)
        for marks, known, value in self._entries:
            if known == key and all(r() is t and n == t._version for (r, n), t in zip(marks, tensors, strict=True)):
                return value
        value = make()
        self._entries.append((tuple((ref(t), t._version) for t in tensors), key, value))
        return value


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
