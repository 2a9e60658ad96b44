"""The shard format against its public definition, read here with struct alone."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest

from andromeda.data.shards import TokenArray, open_shard, token_dtype, write_shard
from andromeda.utils.errors import DataError
from andromeda.utils.files import PART, whole_file


@pytest.mark.parametrize(("dtype", "magic", "version", "letter"), [("<u2", 20240520, 1, "H"), ("<u4", 20240801, 7, "I")])
def test_a_shard_is_llm_cs_format(tmp_path: Path, dtype: str, magic: int, version: int, letter: str) -> None:
    tokens = np.array([0, 1, 65_535, 7], dtype=dtype)
    write_shard(tmp_path / "a.bin", tokens)
    content = (tmp_path / "a.bin").read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header == (magic, version, 4, *[0] * 253)
    assert struct.unpack(f"<4{letter}", content[1024:]) == (0, 1, 65_535, 7)
    assert open_shard(tmp_path / "a.bin").view().tolist() == [0, 1, 65_535, 7]


def header(magic: int = 20240520, version: int = 1, count: int = 3) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no token shard"),
        (b"\x93NUMPY" * 500, "no token shard"),
        (header(magic=1) + bytes(6), "no token shard"),
        (header(version=2) + bytes(6), "version 2, but only version 1"),
        (header() + bytes(5), "truncated"),
        (header() + bytes(8), "truncated"),
        (header(count=0), "truncated"),
        (header(count=-1), "truncated"),
        (header(20240801, 7) + bytes(6), "truncated"),
    ],
)
def test_what_is_no_whole_shard_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        open_shard(tmp_path / "a.bin")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        open_shard(tmp_path / "a.bin")


def test_shards_read_as_one_array(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype="<u2") * 7
    borders = [0, 1, 300, 301, 1000]
    for i in range(4):
        write_shard(tmp_path / f"{i}.bin", tokens[borders[i] : borders[i + 1]])
    array = TokenArray([open_shard(tmp_path / f"{i}.bin") for i in range(4)])
    assert array.size == 1000
    for start, stop in [(0, 1000), (0, 0), (0, 1), (1, 2), (299, 302), (300, 301), (999, 1000), (5, 5)]:
        assert array.read(start, stop).tolist() == tokens[start:stop].tolist()


def test_ids_of_a_vocabulary_fit_its_shards() -> None:
    assert token_dtype(65_536).itemsize == 2
    assert token_dtype(65_537).itemsize == 4


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with contextlib.suppress(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_file(path) as file:
        file.write(b"whole")
        assert [p.name.endswith(PART) for p in tmp_path.iterdir()] == [True]
    assert path.read_bytes() == b"whole"
