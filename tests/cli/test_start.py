"""`andromeda --help` must answer at once, so the command line's root may import nothing that takes long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.command import call

HEAVY = {"torch", "numpy", "pydantic", "transformers", "tokenizers", "datasets", "tensorboard", "triton", "psutil", "safetensors"}


def test_the_root_imports_nothing_heavy() -> None:
    code = "import sys, json, andromeda.cli.main; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout))
    assert "typer" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_a_call_without_a_verb_gets_the_help(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"Usage: {' '.join(('andromeda', *arguments))} [OPTIONS] COMMAND")
    assert "see `" not in said.err
