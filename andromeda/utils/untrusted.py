"""Files of folders that may come from a stranger: read within limits, never written through a link, shown without control characters.

A run, corpus, adapter or export folder is data. Whatever reads one of its files does so through this module: only regular files, no more
bytes than that kind of file can have, JSON of bounded depth whose numbers are finite. A file that is anything else raises `MalformedFile`,
whose text is a clause such as "is not a regular file" that the caller completes with the file's name.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
import unicodedata
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NoReturn

MAX_JSON_BYTES = 64 << 20
"""No JSON document that Andromeda writes comes near this; a larger one is refused before it is parsed."""
MAX_LINE_BYTES = 4 << 20
"""Of a file of one JSON document a line."""
MAX_DEPTH = 64
"""Of nested JSON tables and lists. Far below Python's recursion limit, so that whoever walks the values cannot exceed it."""
MAX_DOTS = 4096
"""In a line of TOML."""
MAX_INTEGER = 2**128
"""Of JSON integers: random states and hashes fit, and every one still converts to a float."""


class MalformedFile(ValueError):
    """A file that is not what its name says; the text is a clause without the file's name."""


def read_regular(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes` bytes.

    A named pipe, a device or a socket is refused at once instead of blocking. Raises MalformedFile, or OSError where it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise MalformedFile(f"is larger than {max_bytes:,} bytes")
    return content


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file opened for reading. Raises MalformedFile for anything else, OSError where it cannot be opened."""
    # Without O_NONBLOCK, opening a named pipe waits for somebody to write into it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise MalformedFile("is not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a regular file. Raises MalformedFile or OSError."""
    try:
        return read_regular(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"is not UTF-8 text (byte {error.start:,})") from None


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a regular file. Raises MalformedFile or OSError."""
    return parse_json(read_regular(path, max_bytes))


def read_json_object(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object of a regular file. Raises MalformedFile, also for JSON that is no object, or OSError."""
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise MalformedFile("holds JSON that is not an object")
    return value


def read_lines(path: str | Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of a regular file without their line ends, in bounded memory. Raises MalformedFile or OSError."""
    with open_regular(path) as file:
        while line := file.readline(max_line_bytes + 1):
            if len(line) > max_line_bytes:
                raise MalformedFile(f"has a line of more than {max_line_bytes:,} bytes")
            yield line.rstrip(b"\r\n")


def parse_json(content: str | bytes) -> Any:
    """A JSON value of bounded depth, whose numbers are finite. Raises MalformedFile."""
    try:
        value = json.loads(content, parse_float=_finite, parse_int=_integer, parse_constant=_constant)
    except MalformedFile:
        raise
    except RecursionError:
        raise MalformedFile(f"nests deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise MalformedFile(f"is not UTF-8 text (byte {error.start:,})") from None
    except ValueError as error:
        raise MalformedFile(f"is not valid JSON ({error})") from None
    if _deeper_than(value, MAX_DEPTH):
        raise MalformedFile(f"nests deeper than {MAX_DEPTH} levels")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document of bounded depth. Raises MalformedFile."""
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        # Python's parser takes quadratic time for a key of very many parts.
        raise MalformedFile(f"has a line with more than {MAX_DOTS:,} points")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise MalformedFile(f"nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise MalformedFile(f"is not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None
    if _deeper_than(values, MAX_DEPTH):
        raise MalformedFile(f"nests deeper than {MAX_DEPTH} levels")
    return values


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file stays in its folder: a text without separators, and no special entry."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def printable(text: str) -> str:
    r"""A text from a file as it may be shown on a terminal: control characters, bidirectional overrides and lone surrogates escaped (\x1b).

    Line ends are escaped too, so that one value stays in one line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def refuse_links(root: Path, path: Path) -> None:
    """Raise MalformedFile where anything below `root` on the way to `path`, itself included, is a symbolic link.

    Whatever writes into a folder calls this first: a link in a folder from somebody else would lead the write elsewhere.
    """
    relative = path.relative_to(root)
    for depth in range(1, len(relative.parts) + 1):
        part = root.joinpath(*relative.parts[:depth])
        if part.is_symlink():
            raise MalformedFile(f"holds a symbolic link, {printable(str(part.relative_to(root)))!r}, which is never written through")


def refuse_links_inside(root: Path, path: Path) -> None:
    """Raise MalformedFile where a file to be written lies below `root`, and a folder on the way to it is a symbolic link.

    For a path that a user gives. What lies elsewhere is the user's own; a link in the place of the file itself is replaced, not followed.
    """
    root, path = Path(os.path.abspath(root)), Path(os.path.abspath(path))
    if root in path.parents and path.parent != root:
        refuse_links(root, path.parent)


def open_for_writing(root: Path, path: Path, *, append: bool = False, mode: int = 0o644) -> IO[bytes]:
    """A regular file below `root` opened for writing, created where it is missing, never through a symbolic or a hard link.

    append: keep what it holds and write behind it; otherwise the file is emptied once it is known to be safe.
    Raises MalformedFile or OSError.
    """
    refuse_links(root, path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_APPEND if append else 0), mode)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedFile("is not a regular file")
        if status.st_nlink > 1:
            raise MalformedFile("is a hard link to another file, which is never written through")
        if not append:
            os.ftruncate(handle, 0)
        return os.fdopen(handle, "ab" if append else "wb")
    except BaseException:
        os.close(handle)
        raise


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedFile(f"holds a number that no float can hold ({digits[:20]})")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 40 or abs(value := int(digits)) > MAX_INTEGER:
        raise MalformedFile(f"holds an integer beyond 2^128 ({digits[:20]}...)")
    return value


def _constant(name: str) -> NoReturn:
    raise MalformedFile(f"holds {name}, which is no JSON number")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [child for node in level if isinstance(node, dict | list) for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return False
    return True


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
