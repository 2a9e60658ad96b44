"""Torn files of compiled code are removed, and nothing else is."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils

from andromeda.utils.compile_cache import is_torn, remove_torn_files

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "default"))
    for folder in ("ab", "locks"):
        (tmp_path / "cache" / folder).mkdir(parents=True)
    return tmp_path / "cache"


def test_a_whole_library_is_not_torn_and_any_beginning_of_it_is(tmp_path: Path) -> None:
    """At every size of a library that a compiler made here."""
    whole, torn = LIBRARY.read_bytes(), tmp_path / "torn.so"
    assert not is_torn(LIBRARY)
    for size in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        torn.write_bytes(whole[:size])
        assert is_torn(torn), size
    torn.write_bytes(b"\0" * len(whole))  # the size is there, and the header not yet
    assert is_torn(torn)
    assert not is_torn(tmp_path / "missing.so")


def test_only_torn_files_that_nobody_writes_are_removed(cache: Path, tmp_path: Path) -> None:
    headers = tmp_path / "default" / "precompiled_headers" / "cd"
    headers.mkdir(parents=True)
    shutil.copy(LIBRARY, cache / "ab" / "whole.so")
    for name in ("empty.so", "empty.main.o", "written.so", "source.cpp"):
        (cache / "ab" / name).touch()
    for name, content in (("whole.h.gch", b"gpch.014..."), ("half.h.gch", b"gpcWrite..."), ("x.h", b"")):
        (headers / name).write_bytes(content)
    with (cache / "locks" / "written.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        removed = remove_torn_files()
    assert sorted(path.name for path in removed) == ["empty.main.o", "empty.so", "half.h.gch"]
    assert sorted(path.name for path in (cache / "ab").iterdir()) == ["source.cpp", "whole.so", "written.so"]
    assert sorted(path.name for path in headers.iterdir()) == ["whole.h.gch", "x.h"]
    assert [path.name for path in remove_torn_files()] == ["written.so"], "its lock is free now"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_torn_library_is_compiled_again(cache: Path) -> None:
    """A library of one function, compiled by Inductor and cut to nothing: PyTorch alone fails to load it."""
    script = (
        "import sys\n"
        "from torch._inductor.codecache import CppCodeCache\n"
        "if 'repair' in sys.argv:\n"
        "    from andromeda.utils.compile_cache import remove_torn_files\n"
        "    remove_torn_files()\n"
        "library = CppCodeCache.load('extern \"C\" int answer() { return 42; }')\n"
        "print(library.answer(), library._name)\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env={**os.environ})

    first = run()
    assert first.returncode == 0, first.stderr
    answer, library = first.stdout.split()
    assert answer == "42"
    assert cache in Path(library).parents
    os.truncate(library, 0)
    torn = run()
    assert torn.returncode != 0
    assert "file too short" in torn.stderr
    repaired = run("repair")
    assert (repaired.returncode, repaired.stdout) == (0, first.stdout), repaired.stderr
