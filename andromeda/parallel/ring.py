"""Collectives by name, and the bytes that each sends when processes pass them around a ring."""

from __future__ import annotations

from typing import Final

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL, OTHER = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "other"
COLLECTIVES: Final = (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL, OTHER)


def bytes_sent(kind: str, group_size: int, whole: float) -> float:
    """Bytes that one process sends in a ring of `group_size`.

    whole: bytes of the tensor that is gathered, scattered or reduced, which every process holds before or after; of all-to-all, those
    that one process gives.
    """
    share = (group_size - 1) / group_size
    return (2 if kind == ALL_REDUCE else 1) * share * whole
