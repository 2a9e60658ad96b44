"""What is computed once for a tensor and used by every layer after it: masks and boundaries made from document numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

Value = TypeVar("Value")


class Memo(Generic[Value]):
    """The last few values that were made from some tensors and a key.

    Tensors are known by identity and by their count of changes in place, so that nothing is compared on the device and
    nothing waits for it. They are not kept alive. Inside torch.compile nothing is remembered: the compiler itself shares
    what layers have in common.
    """

    def __init__(self, size: int) -> None:
        self._entries: deque[tuple[tuple[tuple[ref[Tensor], int], ...], Hashable, Value]] = deque(maxlen=size)

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Value]) -> Value:
        """The value made before for these very tensors and this key, or the one that `make` makes now."""
        # Inference tensors do not count their changes, so that nobody could tell whether a value is still true.
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make()
        for marks, known, value in self._entries:
            if known == key and len(marks) == len(tensors) and all(r() is t and n == t._version for (r, n), t in zip(marks, tensors, strict=True)):
                return value
        value = make()
        self._entries.append((tuple((ref(t), t._version) for t in tensors), key, value))
        return value
