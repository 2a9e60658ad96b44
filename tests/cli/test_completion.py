"""Shell completion, by the shell itself where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "import sys; from andromeda.cli.main import main; sys.argv[0] = 'andromeda'; main()"]


def complete(line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    environment = {"_ANDROMEDA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("andromeda ge", ["generate"]),
        ("andromeda data ", ["build", "show", "compare"]),
        ("andromeda generate --temp", ["--temperature"]),
        ("andromeda nothing-like-this", []),
    ],
)
def test_verbs_and_options_are_completed(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(shell: str) -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | {"_ANDROMEDA_COMPLETE": f"source_{shell}"})
    assert done.returncode == 0, done.stderr
    assert f"_ANDROMEDA_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed.")
def test_bash_completes_a_verb(tmp_path: Path) -> None:
    command = tmp_path / "andromeda"
    command.write_text(f'#!{sys.executable}\nimport sys\nfrom andromeda.cli.main import main\nsys.argv[0] = "andromeda"\nmain()\n')
    command.chmod(0o755)
    script = """
        eval "$(_ANDROMEDA_COMPLETE=source_bash andromeda)"
        complete -p andromeda >&2
        COMP_WORDS=(andromeda ver); COMP_CWORD=1
        _andromeda_completion andromeda
        echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["verify"], done.stderr
