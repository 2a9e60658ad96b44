"""Tensors of a checkpoint by name, whole or any block of them, whichever and however many ranks wrote it.

One process writes `model.safetensors`. Several write one file each, `model-00000-of-00004.safetensors`, and `shards.json` beside them:

    {"files": {"model": [names]}, "layouts": [[[file, [offset], [shape]], ...], ...],
     "tensors": {"model": {name: [dtype, [shape], layout]}}}

A layout lists the blocks of a tensor, each with the number of the file that holds it under the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from andromeda.train.checkpoint_chunks import Chunk, is_sharded, local_chunk, sharded_like, whole
from andromeda.utils.errors import CheckpointError
from andromeda.utils.untrusted import MalformedFile, is_plain_name, open_regular, printable, read_json_object

SHARDS = "shards.json"
MAX_FILES = 1 << 16
"""Of one part: one for each rank."""
DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""What safetensors holds, by the name in shards.json."""


class PartTensors(Mapping[str, Tensor]):
    """The tensors of one part, read when they are asked for.

    like: live weights by name; a weight, or a state of it (`name/entry`) of the same shape, is read as a DTensor laid out like it,
    each rank its own block.
    Raises CheckpointError where a file does not hold what it should.
    """

    def __init__(self, part: str, path: Path, like: Mapping[str, Tensor] | None = None) -> None:
        self._path, self._part, self._like = path, part, like or {}
        try:
            self._index = read_index(path, part)
            self._open = lru_cache(maxsize=64)(self._open_file)
        except (MalformedFile, OSError) as error:
            raise _unreadable(path / SHARDS, error) from None

    def __getitem__(self, name: str) -> Tensor:
        _, shape, _ = self._index[name]
        like = self._like.get(name.partition("/")[0])
        if like is not None and is_sharded(like) and tuple(like.shape) == shape:
            return sharded_like(like, self.read(name, local_chunk(like).chunk))
        return self.read(name, whole(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._index[name][1]

    def read(self, name: str, chunk: Chunk) -> Tensor:
        """A block of a tensor, on the CPU."""
        dtype, _, pieces = self._index[name]
        found = [(file, held, common) for file, held in pieces if (common := held.intersect(chunk))]
        if len(found) == 1 and found[0][2] == chunk:
            return self._read_block(found[0][0], name, dtype, found[0][1], chunk)
        # All are read before the whole is allocated, whose size shards.json claims.
        blocks = [(common, self._read_block(file, name, dtype, held, common)) for file, held, common in found]
        result = torch.zeros(chunk.shape, dtype=dtype)
        for common, values in blocks:
            result[common.slices(inside=chunk)] = values
        return result

    def _read_block(self, file: str, name: str, dtype: torch.dtype, held: Chunk, wanted: Chunk) -> Tensor:
        path = self._path / file
        try:
            stored = self._open(file)
            if not held.shape or held == wanted:
                values: Tensor = stored.get_tensor(name)
            else:
                values = stored.get_slice(name)[wanted.slices(inside=held)]
        except (OSError, SafetensorError, MalformedFile, LookupError, ValueError, RuntimeError) as error:
            raise _unreadable(path, error) from None
        if tuple(values.shape) != wanted.shape or values.dtype != dtype:
            raise _unreadable(path, f"{printable(name)} is not a block as {SHARDS} says")
        return values

    def _open_file(self, file: str) -> Any:
        open_regular(self._path / file).close()  # before safetensors opens it, which would wait for a named pipe
        return safe_open(self._path / file, framework="pt")


Index = Mapping[str, tuple[torch.dtype, tuple[int, ...], list[tuple[str, Chunk]]]]
"""Of each tensor: dtype, shape, and its blocks with the file of each."""


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read for it from a checkpoint."""
    return tensors.shape(name) if isinstance(tensors, PartTensors) else tuple(tensors[name].shape)


def has_part(path: Path, part: str) -> bool:
    """Whether a checkpoint holds a part."""
    return (path / f"{part}.safetensors").exists() or bool(list(path.glob(f"{part}-?????-of-?????.safetensors")))


def part_of_file(name: str) -> str:
    """The part that a file of tensors belongs to: `model` of `model.safetensors` and `model-00000-of-00004.safetensors`."""
    stem, _, count = name.removesuffix(".safetensors").rpartition("-of-")
    return stem.rpartition("-")[0] if stem and count.isdecimal() else name.removesuffix(".safetensors")


def read_part(path: Path, part: str, like: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
    """The tensors of one part of a checkpoint; see PartTensors."""
    return PartTensors(part, path, like)


def read_index(path: Path, part: str) -> Index:
    """What a part of a checkpoint holds and where. Raises MalformedFile, CheckpointError or OSError."""
    single = path / f"{part}.safetensors"
    if single.exists() or not (path / SHARDS).exists():
        return _single_index(single)
    try:
        return _sharded_index(read_json_object(path / SHARDS), part)
    except (LookupError, TypeError, AttributeError) as error:
        raise MalformedFile(f"does not describe {part} ({type(error).__name__})") from None


def _single_index(path: Path) -> Index:
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(held.get_shape()) for name, held in found.items()}
            dtypes = {name: SAFETENSORS_DTYPES[held.get_dtype()] for name, held in found.items()}
    except (OSError, SafetensorError, MalformedFile, LookupError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from None
    return {name: (dtypes[name], shape, [(path.name, whole(shape))]) for name, shape in shapes.items()}


SAFETENSORS_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""By the name in a safetensors header."""


def _sharded_index(values: dict[str, Any], part: str) -> Index:
    files = values["files"][part]
    if not (isinstance(files, list) and len(files) <= MAX_FILES and all(is_plain_name(f) and part_of_file(f) == part for f in files)):
        raise MalformedFile(f"names files that cannot be those of {part}")
    layouts: dict[int, list[tuple[str, Chunk]]] = {}

    def layout(number: int) -> list[tuple[str, Chunk]]:
        if number not in layouts:
            blocks = values["layouts"][number]
            layouts[number] = [(files[_size(file)], Chunk(_sizes(offset), _sizes(shape))) for file, offset, shape in blocks]
        return layouts[number]

    index: dict[str, tuple[torch.dtype, tuple[int, ...], list[tuple[str, Chunk]]]] = {}
    for name, (dtype, shape, number) in values["tensors"][part].items():
        pieces, size = layout(_size(number)), whole(_sizes(shape))
        outside = any(chunk.numel and chunk.intersect(size) != chunk for _, chunk in pieces)
        if outside or sum(chunk.numel for _, chunk in pieces) != size.numel:
            raise MalformedFile(f"has blocks of {printable(name)} that are not the whole of it")
        index[name] = (DTYPES[dtype], size.shape, pieces)
    return index


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise MalformedFile("holds a size that is no whole number")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 16:
        raise MalformedFile("holds a shape that is no list of sizes")
    return tuple(map(_size, values))


def _unreadable(path: Path, error: object) -> CheckpointError:
    reason = printable(" ".join(str(error).split()))[:200]
    return CheckpointError(f"{path} cannot be read ({reason}): use an older checkpoint.")
