"""Files from strangers: what is no plain, bounded JSON file is refused with a clause, and nothing is written through a link."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.utils import untrusted
from andromeda.utils.untrusted import (
    MalformedFile,
    open_for_writing,
    parse_json,
    printable,
    read_json,
    read_json_object,
    read_lines,
    refuse_links_inside,
)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))


@pytest.mark.parametrize("make", [pipe, device, folder])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "state.json"
    make(path)
    with pytest.raises(MalformedFile, match="not a regular file"):
        read_json(path)
    with pytest.raises(MalformedFile, match="not a regular file"):
        list(read_lines(path))


def test_a_socket_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    listening(Path("state.json"))
    with pytest.raises(OSError, match=r"state\.json"):
        read_json("state.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "deeper"),
        (b"[" * 66 + b"]" * 66, "deeper"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deeper"),
        (b"1e999", "no float"),
        (b"[-1e400]", "no float"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"9" * 5000, "2\\^128"),
        (str(2**128 + 1).encode(), "2\\^128"),
        (b'{"a": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xfa", "UTF-8|JSON"),
    ],
    ids=str,
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(content)
    with pytest.raises(MalformedFile, match=reason) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_more_bytes_than_allowed_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(b" " * 101)
    with pytest.raises(MalformedFile, match="larger than 100 bytes"):
        read_json(path, max_bytes=100)
    path.write_bytes(b"1\n" + b"x" * 101)
    lines = read_lines(path, max_line_bytes=100)
    assert next(lines) == b"1"
    with pytest.raises(MalformedFile, match="more than 100 bytes"):
        next(lines)


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text("[1]")
    with pytest.raises(MalformedFile, match="not an object"):
        read_json_object(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**128), 2**128) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(VALUES)
def test_any_ordinary_value_is_read_as_json_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@given(st.text())
def test_what_is_shown_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029\u202e\u2066" for c in shown)
    assert printable("key \x1b[31m") == "key \\x1b[31m"


def test_plain_text_is_shown_as_it_is() -> None:
    assert printable("Straße, 日本語 😀") == "Straße, 日本語 😀"


@pytest.mark.parametrize("append", [False, True])
def test_nothing_is_written_through_links(tmp_path: Path, append: bool) -> None:
    """A file link, a folder link, a dangling link and a hard link: the target keeps its bytes, and no target is made."""
    victim, outside, root = tmp_path / "victim", tmp_path / "outside", tmp_path / "run"
    victim.write_bytes(b"precious")
    outside.mkdir()
    root.mkdir()
    (root / "file").symlink_to(victim)
    (root / "folder").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "new")
    os.link(victim, root / "hard")
    for name in ("file", "folder/x", "dangling", "hard"):
        with pytest.raises(MalformedFile, match="link"):
            open_for_writing(root, root / name, append=append)
    assert victim.read_bytes() == b"precious"
    assert not list(outside.iterdir())
    assert not (tmp_path / "new").exists()


def test_ordinary_files_are_written_and_appended_to(tmp_path: Path) -> None:
    for content, append in ((b"one", False), (b"two", True), (b"!", False)):
        with open_for_writing(tmp_path, tmp_path / "log", append=append) as file:
            file.write(content)
        expected = {b"one": b"one", b"two": b"onetwo", b"!": b"!"}[content]
        assert (tmp_path / "log").read_bytes() == expected
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((MalformedFile, OSError)):
        open_for_writing(tmp_path, tmp_path / "pipe")


def test_the_depth_limit_is_exact() -> None:
    limit = untrusted.MAX_DEPTH
    assert parse_json("[" * limit + "1" + "]" * limit)
    with pytest.raises(MalformedFile):
        parse_json("[" * (limit + 1) + "1" + "]" * (limit + 1))


def test_only_folders_on_the_way_inside_the_root_must_not_be_links(tmp_path: Path) -> None:
    """The user's own folders may be links, and a link in the place of the file is replaced by what is written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pages").symlink_to(tmp_path / "out")
    (tmp_path / "mine").symlink_to(tmp_path / "out")
    (tmp_path / "run" / "a.html").symlink_to(tmp_path / "out" / "a.html")
    refuse_links_inside(tmp_path / "run", tmp_path / "mine" / "a.html")
    refuse_links_inside(tmp_path / "run", tmp_path / "run" / "a.html")
    with pytest.raises(MalformedFile, match="pages"):
        refuse_links_inside(tmp_path / "run", tmp_path / "run" / "pages" / "a.html")
    with pytest.raises(MalformedFile, match="pages"):
        refuse_links_inside(tmp_path / "run", tmp_path / "mine" / ".." / "run" / "pages" / "a.html")
