"""Sizes of the mesh: which ones are resolved, and which are refused in one sentence."""

from __future__ import annotations

import itertools
import math

import pytest

from andromeda.config.parallel import ParallelConfig
from andromeda.parallel.layout import DIMENSIONS, Layout, resolve_layout
from andromeda.utils.errors import ConfigError


def test_processes_alone_are_all_of_shard() -> None:
    assert resolve_layout(ParallelConfig(), 4) == Layout(shard=4)
    assert resolve_layout(ParallelConfig(), 1).world_size == 1


def test_what_is_left_is_a_factor_of_the_processes() -> None:
    config = ParallelConfig(replicate=-1, shard=2, tensor=2)
    assert resolve_layout(config, 16) == Layout(replicate=4, shard=2, tensor=2)
    assert resolve_layout(ParallelConfig(shard=4, expert=-1), 4).expert == 4


@pytest.mark.parametrize(
    ("config", "processes", "named"),
    [
        (ParallelConfig(tensor=3), 4, "parallel.tensor = 3"),
        (ParallelConfig(replicate=2, shard=2), 8, "--nproc 4"),
        (ParallelConfig(replicate=-1), 4, "both -1"),
        (ParallelConfig(shard=1), 2, "--nproc 1"),
        (ParallelConfig(expert=3), 4, "parallel.expert = 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: ParallelConfig, processes: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve_layout(config, processes)


def test_coordinates_enumerate_the_mesh_in_row_major_order() -> None:
    layout = Layout(replicate=2, shard=3, context=2, tensor=2)
    expected = list(itertools.product(*(range(size) for size in layout.sizes())))
    found = [tuple(layout.coordinates(rank)[name] for name in DIMENSIONS) for rank in range(math.prod(layout.sizes()))]
    assert found == expected
