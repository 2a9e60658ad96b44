"""Bytes that collectives send, counted while they run: on real process groups as on torch's fake ones, which exchange nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from andromeda.parallel.ring import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, OTHER, REDUCE_SCATTER, bytes_sent

_KINDS: Final = (
    ("reduce_scatter", REDUCE_SCATTER),
    ("allgather", ALL_GATHER),
    ("all_gather", ALL_GATHER),
    ("allreduce", ALL_REDUCE),
    ("all_reduce", ALL_REDUCE),
    ("alltoall", ALL_TO_ALL),
    ("all_to_all", ALL_TO_ALL),
)
HOST_SIZE = 8
"""Devices of one host."""
_SILENT: Final = ("wait_tensor", "barrier", "recv", "check_for_nan")
"""Operations of these namespaces that send nothing themselves."""


class TrafficCounter(TorchDispatchMode):
    """While active, counts what this process sends by collective, with the formulas of `bytes_sent`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        """By collective."""
        self.calls: Counter[str] = Counter()
        self.within_host = 0
        """Bytes of groups whose processes are all on one host of `HOST_SIZE`."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes no result, so torch.compile may trace under it."""
        return True

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and not any(word in name for word in _SILENT):
            kind = next((kind for word, kind in _KINDS if word in name), OTHER)
            ranks = _group_ranks(args)
            sent = round(bytes_sent(kind, len(ranks), _whole(kind, name, args, out)))
            self.bytes[kind] += sent
            self.calls[kind] += 1
            self.within_host += sent if len({rank // HOST_SIZE for rank in ranks}) == 1 else 0
        return out


def _whole(kind: str, name: str, args: Any, out: Any) -> int:
    """Bytes of the whole tensor: c10d's own operations are given it, the functional ones return it or are given it."""
    first, second = _nbytes(args[0]), _nbytes(args[1]) if len(args) > 1 else 0
    if kind in (ALL_GATHER, REDUCE_SCATTER):
        return max(first, second, _nbytes(out))
    return second if kind == ALL_TO_ALL and name.startswith("alltoall") else first


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _group_ranks(args: Any) -> list[int]:
    """The processes of the group among the arguments of an operation, which is given as an object or by its name."""
    names: list[Any] = [value for value in args if isinstance(value, str)]
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                names.append(dist.ProcessGroup.unbox(value).group_name)
            except RuntimeError:  # another kind of object, such as the reduction
                continue
    group = dist.distributed_c10d._resolve_process_group(names[-1])  # type: ignore[attr-defined]
    return dist.get_process_group_ranks(group)
