"""The sizes of the mesh, as numbers: resolved and checked from the configuration and the number of processes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from andromeda.config.parallel import REST, ParallelConfig
from andromeda.utils.errors import ConfigError

DIMENSIONS = ("replicate", "shard", "context", "tensor")
"""Dimensions of the mesh, the outermost first: ranks that exchange most are neighbors."""


class Layout(NamedTuple):
    """Sizes of the mesh. `expert` divides `shard` and is no factor of its own."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Number of parts that the sequences of a step are divided into."""
        return self.replicate * self.shard

    def sizes(self) -> tuple[int, ...]:
        """In the order of DIMENSIONS."""
        return self.replicate, self.shard, self.context, self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a process is in each dimension."""
        found: dict[str, int] = {}
        for name, size in zip(reversed(DIMENSIONS), reversed(self.sizes()), strict=True):
            rank, found[name] = divmod(rank, size)
        return found

    def describe(self) -> str:
        """The sizes above one, such as `replicate 2 x shard 4`."""
        named = [f"{name} {size}" for name, size in self._asdict().items() if size > 1]
        return " x ".join(named) or "one process"


ONE = Layout()
"""One process."""


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The mesh of `world_size` processes. Raises ConfigError, one sentence, where the sizes do not make that number."""
    sizes = {name: getattr(config, name) for name in DIMENSIONS}
    free = [name for name, size in sizes.items() if size == REST]
    if len(free) > 1:
        raise ConfigError(f"parallel.{free[0]} and parallel.{free[1]} are both {REST}: leave one of them to be what is left.")
    known = math.prod(size for size in sizes.values() if size != REST)
    given = " x ".join(f"parallel.{name} = {size}" for name, size in sizes.items() if size not in (1, REST)) or "the mesh"
    if free:
        if world_size % known:
            raise ConfigError(f"{given} does not divide {_processes(world_size)}: start a multiple of {known}, or change the sizes.")
        sizes[free[0]] = world_size // known
    elif known != world_size:
        raise ConfigError(
            f"{given} makes {_processes(known)} and {world_size} {'was' if world_size == 1 else 'were'} started: "
            f"give --nproc {known}, or parallel.shard=-1."
        )
    expert = sizes["shard"] if config.expert == REST else config.expert
    if sizes["shard"] % expert:
        raise ConfigError(
            f"parallel.expert = {expert} does not divide parallel.shard = {sizes['shard']}: experts are spread over processes of `shard`."
        )
    return Layout(**sizes, expert=expert)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
