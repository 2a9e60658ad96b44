"""`andromeda generate --nproc`: the text is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from andromeda import Andromeda
from tests.parallel.models import small


def answer(run: Path, *options: str) -> dict[str, object]:
    """What the command prints for a prompt of token ids."""
    prompts = run.parent / "prompts.jsonl"
    prompts.write_text("[3, 1, 4, 1, 5]\n")
    command = [sys.executable, "-m", "andromeda", "generate", str(run), "--prompts", str(prompts), "--json", "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    Andromeda(small(attention__num_heads=4, attention__head_dim=16, alibi__num_heads=2)).save(tmp_path / "run")
    options = ("--max-new-tokens=12", "--temperature=0.8", "--seed=3")
    one, several = answer(tmp_path / "run", *options), answer(tmp_path / "run", *options, "--nproc=2")
    assert several["ids"] == one["ids"]
    assert len(several["ids"]) == 12  # type: ignore[arg-type]
