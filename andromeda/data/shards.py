"""Token shards in llm.c's format: a header of 256 int32 (magic, version, count), then the tokens.

uint16 shards carry magic 20240520, version 1 (read by llm.c, modded-nanogpt and others as they are); uint32 shards carry
20240801, version 7 (llm.c's format for larger vocabularies). Everything is little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from andromeda.utils.errors import DataError
from andromeda.utils.files import whole_file
from andromeda.utils.untrusted import MalformedFile, open_regular

HEADER = 256
FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Magic number to (version, token type)."""


@dataclass(frozen=True)
class Shard:
    """One checked shard: where it is, what it holds."""

    path: Path
    tokens: int
    dtype: np.dtype
    stamp: tuple[int, int]
    """Inode and time of the file, because the same path may hold another shard later."""

    def view(self) -> np.ndarray:
        """The tokens, memory-mapped read-only: (tokens,) of uint16 or uint32."""
        return _map(self)


@lru_cache(maxsize=256)
def _map(shard: Shard) -> np.ndarray:
    """Bounded, because every mapping holds a file descriptor and a large corpus has more shards than those."""
    return np.memmap(shard.path, dtype=shard.dtype, mode="r", offset=4 * HEADER, shape=(shard.tokens,))


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest shard type that holds every id of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard whole or not at all; `tokens` is uint16 or uint32."""
    magic, version = next((m, v) for m, (v, dtype) in FORMATS.items() if dtype == tokens.dtype)
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    with whole_file(path) as file:
        file.write(header.tobytes())
        file.write(tokens.tobytes())


def open_shard(path: Path) -> Shard:
    """Check a shard's header against its size. Raises DataError with the cause when it is no whole shard."""
    try:
        status = path.stat()
        with open_regular(path) as file:
            content = file.read(4 * HEADER)
        header = np.frombuffer(content[: len(content) // 4 * 4], dtype="<i4")
    except MalformedFile as error:
        raise DataError(f"The shard {path} {error}: check the path or build the corpus again.") from None
    except OSError as error:
        raise DataError(f"The shard {path} cannot be read ({error.strerror}): check the path or build the corpus again.") from error
    if len(header) < HEADER or int(header[0]) not in FORMATS:
        raise DataError(
            f"{path} is no token shard (its first number is not one of {', '.join(map(str, FORMATS))}): name a .bin of llm.c's kind."
        )
    version, dtype = FORMATS[int(header[0])]
    if header[1] != version:
        raise DataError(f"The shard {path} has version {header[1]}, but only version {version} is known: write it again.")
    size = status.st_size
    tokens, expected = int(header[2]), 4 * HEADER + int(header[2]) * dtype.itemsize
    if tokens <= 0 or size != expected:
        raise DataError(f"The shard {path} is truncated or damaged: {tokens} tokens need {expected} bytes, it has {size}; write it again.")
    return Shard(path, tokens, dtype, (status.st_ino, status.st_mtime_ns))


class TokenArray:
    """Several shards as one array of tokens, read by position."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *[s.tokens for s in shards]])
        self.size = int(self._starts[-1])
        self.dtype = shards[0].dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 copy of the tokens from `start` up to `stop`, across shard borders."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            shard, base = self._shards[first], int(self._starts[first])
            end = min(stop, base + shard.tokens)
            parts.append(shard.view()[start - base : end - base].astype(np.int64))
            start, first = end, first + 1
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
