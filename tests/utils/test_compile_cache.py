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
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_after_a_kill_compiles_again(cache: Path) -> None:
    """Every library of the cache cut to nothing: PyTorch alone fails, and after the removal it computes the same."""
    script = (
        "import sys, torch\n"
        "if 'mend' in sys.argv:\n"
        "    from andromeda.utils.compile_cache import remove_torn_files\n"
        "    remove_torn_files()\n"
        "print(float(torch.compile(lambda x: (x.sin() * 2 + x).sum())(torch.arange(64.0))))\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env={**os.environ})

    first = run()
    libraries = [path for path in cache.rglob("*.so") if path.is_file()]
    assert first.returncode == 0, first.stderr
    assert libraries
    for path in libraries:
        os.truncate(path, 0)
    assert run().returncode != 0
    mended = run("mend")
    assert (mended.returncode, mended.stdout) == (0, first.stdout), mended.stderr
