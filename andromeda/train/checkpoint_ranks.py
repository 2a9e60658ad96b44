"""Several processes agree on one checkpoint: what fails on one rank fails on all, and each block of a tensor is written by one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

from andromeda.train.checkpoint_chunks import Chunk, LocalTensors
from andromeda.utils.errors import AndromedaError, CheckpointError

T = TypeVar("T")


class Ranks:
    """The processes that write a checkpoint together. group: a gloo process group of torch.distributed, used for nothing else
    while a checkpoint is written in the background; None is one process.
    """

    def __init__(self, group: Any = None) -> None:
        self._group, self.rank, self.size = group, 0, 1
        if group is not None:
            import torch.distributed as dist

            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def split(self) -> Ranks:
        """The same processes with a process group of their own."""
        if self._group is None:
            return self
        import torch.distributed as dist

        return Ranks(dist.new_group(dist.get_process_group_ranks(self._group), backend="gloo"))

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank, and return the results by rank. Where it fails on one rank, every rank raises."""
        if self._group is None:
            return [work()]
        failure: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes = self.all_gather((result, None if failure is None else str(failure)))
        if failure is not None:
            raise self._told(failure)
        for rank, (_, text) in enumerate(outcomes):
            if text is not None:
                raise self._told(RankFailed(f"rank {rank} failed: {text}"))
        return [outcome for outcome, _ in outcomes]

    def _told(self, error: Exception) -> Exception:
        """The error, of which rank 0 tells the user."""
        if isinstance(error, AndromedaError):
            error.told = self.rank > 0
        return error

    def on_first(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0; the others wait, and raise where it fails."""
        self.agree(work if self.rank == 0 else lambda: None)

    def on_all(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return its own result on each, which need not be sent; every rank raises where one fails."""
        results: list[T] = []
        self.agree(lambda: results.append(work()))
        return results[0]

    def from_first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its result on every rank; every rank raises where it fails."""
        found: Any = self.agree(work if self.rank == 0 else lambda: None)[0]
        return found  # type: ignore[no-any-return]


ONE = Ranks()
"""One process that runs alone."""


class RankFailed(AndromedaError):
    """Another rank could not do its part."""


class Block(NamedTuple):
    """A rank's block of a tensor, without its values."""

    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    chunk: Chunk


Blocks = Mapping[str, Mapping[str, Block]]
"""Of each part by tensor name."""


class ShardPlan:
    """Which rank writes which block, the same on every rank.

    A part of which every rank holds every tensor whole is written by rank 0 as one file. Copies of a block are written once: those of a
    sharded tensor by ranks that its name picks, so that the work is spread.
    """

    def __init__(self, blocks: list[Blocks]) -> None:
        self._blocks = blocks
        self.parts = list(dict.fromkeys(part for held in blocks for part in held))
        self.sharded = {part for part in self.parts if any(_partial(block) for held in blocks for block in held.get(part, {}).values())}
        self._owners = {part: {name: self._owners_of(part, name) for name in blocks[0].get(part, {})} for part in self.parts}
        for part in self.parts:
            if any(held.get(part, {}).keys() != blocks[0].get(part, {}).keys() for held in blocks):
                raise CheckpointError(f"The ranks hold different tensors of {part}: this is a defect, please report it.")

    def _owners_of(self, part: str, name: str) -> dict[int, Chunk]:
        """Each rank that writes a block of a tensor, with the block."""
        holders: dict[Chunk, list[int]] = {}
        for rank, held in enumerate(self._blocks):
            chunk = held[part][name].chunk
            if chunk.numel or not any(self._blocks[0][part][name].shape):
                holders.setdefault(chunk, []).append(rank)
        if not any(map(_partial, (held[part][name] for held in self._blocks))):
            return {0: self._blocks[0][part][name].chunk}
        return {ranks[crc32(name.encode()) % len(ranks)]: chunk for chunk, ranks in holders.items()}

    def names(self, part: str, rank: int) -> list[str]:
        """The tensors of which `rank` writes its block."""
        return [name for name, owners in self._owners[part].items() if rank in owners]

    def file(self, part: str, rank: int) -> str:
        """The file of a rank's blocks of a part."""
        return f"{part}-{rank:05d}-of-{len(self._blocks):05d}.safetensors" if part in self.sharded else f"{part}.safetensors"

    def describe(self) -> dict[str, Any]:
        """What shards.json holds."""
        layouts: dict[str, int] = {}
        rows: list[Any] = []
        files: dict[str, list[str]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for part in sorted(self.sharded):
            writers = [rank for rank in range(len(self._blocks)) if self.names(part, rank)]
            files[part] = [self.file(part, rank) for rank in writers]
            tensors[part] = {}
            for name, owners in self._owners[part].items():
                layout = [[writers.index(rank), list(chunk.offset), list(chunk.shape)] for rank, chunk in sorted(owners.items())]
                if (key := str(layout)) not in layouts:
                    layouts[key] = len(rows)
                    rows.append(layout)
                block = self._blocks[0][part][name]
                tensors[part][name] = [block.dtype, list(block.shape), layouts[key]]
        return {"files": files, "layouts": rows, "tensors": tensors}


def _partial(block: Block) -> bool:
    return block.chunk.shape != block.shape


def blocks_of(tensors: LocalTensors) -> Blocks:
    """A rank's blocks without their values."""
    return {
        part: {name: Block(str(one.values.dtype).removeprefix("torch."), one.shape, one.chunk) for name, one in held.items()}
        for part, held in tensors.items()
    }
