"""Memory that runs out ends in one sentence, whichever library was the one to notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from andromeda.cli import main as cli

EXABYTE = 1 << 60
WAYS = {
    "python": lambda: bytearray(EXABYTE),
    "numpy": lambda: np.ones(EXABYTE, dtype=np.uint8),
    "torch on a CPU": lambda: torch.ones(EXABYTE, dtype=torch.uint8),
    "torch on a GPU": lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")),
}


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_runs_out(way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_command", lambda: lambda **_: WAYS[way]())
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("andromeda: Out of memory")
    assert printed.strip().endswith(".")
    assert printed.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_command", lambda: lambda **_: raise_(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main()
