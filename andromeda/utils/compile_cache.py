"""Torn files in the cache of compiled code: found before it is used, and removed, so that they are compiled again.

PyTorch's compiler (Inductor) lets g++ write a library under its final name and takes whatever is there for whole. A process that is killed
while g++ writes leaves half a file, and every later start ends with "file too short". Its other files, and all of Triton's, are written
beside and renamed, so that a kill cannot tear them.
"""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

from andromeda.utils.log import get_logger

log = get_logger()

ELF_HEADER = 64
"""Bytes of the header of a 64-bit ELF file."""
PRECOMPILED = (b"gpch", b"CPCH")
"""How a whole precompiled header of gcc and clang begins; gcc writes `gpcW` until it is complete."""


def remove_torn_files() -> list[Path]:
    """Remove the torn files of Inductor's cache and return them. Files that another process is writing, by its lock, are left alone."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    removed = []
    headers = Path(default_cache_dir()) / "precompiled_headers"
    for folder, endings in ((Path(cache_dir()), (".so", ".o")), (headers, (".gch", ".pch"))):
        for path in folder.glob("*/*") if folder != headers else folder.rglob("*"):
            if path.suffix in endings and is_torn(path) and _remove(path, folder / "locks"):
                removed.append(path)
    if removed:
        log.warning("%d file(s) of compiled code in %s were torn by a killed process; they are compiled again", len(removed), cache_dir())
    return removed


def is_torn(path: Path) -> bool:
    """Whether a library, object file or precompiled header ends before it is complete. False for a file that cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(ELF_HEADER)
    except OSError:
        return False
    if path.suffix in (".gch", ".pch"):
        return not head.startswith(PRECOMPILED)
    if len(head) < ELF_HEADER or not head.startswith(b"\x7fELF"):
        return True
    if head[4] != 2:  # not 64 bits: none that this library compiles
        return False
    # The linker writes the table of sections, at the end of the file, and then the header that says where it is.
    order = "<" if head[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", head, 40)
    entry_size, entries = struct.unpack_from(f"{order}HH", head, 58)
    return bool(table == 0 or table + entry_size * entries > size)


def _remove(path: Path, locks: Path) -> bool:
    """Remove a file unless the lock under which Inductor writes it is held."""
    try:
        locks.mkdir(exist_ok=True)
        with (locks / f"{path.name.partition('.')[0]}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_torn(path):
                path.unlink()
                return True
    except OSError:  # held, or not ours to remove
        pass
    return False
