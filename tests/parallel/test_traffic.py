"""Counted bytes against the sizes of the tensors, by hand, for each way in which torch names a collective."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from andromeda.ops.collectives import Group, all_gather, all_reduce, reduce_scatter
from andromeda.parallel.ring import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, OTHER, REDUCE_SCATTER
from andromeda.parallel.traffic import TrafficCounter
from tests.train.ranks import on_ranks


def count(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    whole, share = torch.zeros(8), torch.zeros(2)
    with TrafficCounter() as counter:
        dist.all_gather_into_tensor(whole, share)
        dist.all_gather([torch.zeros(2) for _ in range(4)], share)
        all_gather(share, Group.of_process_group(group))
    assert counter.bytes == {ALL_GATHER: 3 * 3 * 8}, "three others get two numbers of four bytes, three times"
    with TrafficCounter() as counter:
        all_reduce(whole, Group.of_process_group(group))
        dist.all_reduce(whole)
    assert counter.bytes == {ALL_REDUCE: 2 * 2 * 3 * 8}
    with TrafficCounter() as counter:
        dist.reduce_scatter_tensor(share, whole)
        reduce_scatter(whole.view(4, 2), Group.of_process_group(group))
    assert counter.bytes == {REDUCE_SCATTER: 2 * 3 * 8}
    with TrafficCounter() as counter:
        dist.all_to_all_single(torch.zeros(8), whole)
        dist.broadcast(whole, 0)
        dist.barrier()
        whole.add_(1)
    assert counter.bytes == {ALL_TO_ALL: 3 * 8, OTHER: 3 * 8}
    assert counter.total == 2 * 3 * 8
    assert counter.calls == {ALL_TO_ALL: 1, OTHER: 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bytes_of_each_collective() -> None:
    on_ranks(4, count)
