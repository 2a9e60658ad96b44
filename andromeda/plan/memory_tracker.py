"""Counts the bytes held by the results of tensor operations, on fake tensors as on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from andromeda.utils.dtensor import local

CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


class MemoryTracker(TorchDispatchMode):
    """While active, every storage that an operation returns counts until nothing refers to it. Workspaces of kernels are not seen."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.peak = 0, 0
        self._sizes: dict[int, int] = {}
        self._weights: set[int] = set()
        self._copies: set[int] = set()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no result, so torch.compile may trace under it."""
        return True

    def enter(self, tensors: Iterable[Tensor]) -> None:
        """Count existing tensors."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                weakref.finalize(storage, self._leave, storage._cdata)
        self.peak = max(self.peak, self.held)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage again whose size was changed, as FSDP frees and allocates gathered weights."""
        if storage._cdata in self._sizes:
            self.held += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.held)

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Count existing weights, and recognize their copies in another dtype."""
        weights = list(weights)
        self.enter(weights)
        self._weights |= {weight.untyped_storage()._cdata for weight in weights}

    @property
    def copied(self) -> int:
        """Bytes of copies of watched weights."""
        return sum(self._sizes.get(copy, 0) for copy in self._copies)

    def restart(self) -> None:
        """Reset the peak to what is held now."""
        self.peak = self.held

    def _leave(self, storage: int) -> None:
        self.held -= self._sizes.pop(storage)
        self._copies.discard(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.enter(made)
        if func in CASTS and args[0].untyped_storage()._cdata in self._weights:
            self._copies |= {tensor.untyped_storage()._cdata for tensor in made} - self._weights
        return out
