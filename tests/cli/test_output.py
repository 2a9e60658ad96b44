"""Where output goes that cannot be written, and what was printed before something else failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERB = """
from andromeda.cli import main
def verb(**_):
    print("kept")
    {then}
main._command = lambda: verb
main.main()
"""
FAILS = 'raise PermissionError(13, "Permission denied", "elsewhere")'


def run(then: str, out: Path) -> tuple[int, str]:
    """Exit code and what is said of a verb that prints and then does something, in a process whose output is held back as usual."""
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(out, "w") as file:
        ended = subprocess.run([sys.executable, "-c", VERB.format(then=then)], stdout=file, stderr=subprocess.PIPE, text=True, env=quiet)
    return ended.returncode, ended.stderr


def test_what_was_printed_before_a_failure_arrives(tmp_path: Path) -> None:
    code, said = run(FAILS, tmp_path / "out")
    assert (code, (tmp_path / "out").read_text()) == (2, "kept\n")
    assert said == "andromeda: elsewhere: Permission denied: free some space or give another path, and call again.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
@pytest.mark.parametrize("then", ["pass", FAILS])
def test_output_that_cannot_be_written_is_one_sentence(then: str) -> None:
    code, said = run(then, Path("/dev/full"))
    assert code == 2
    assert said.startswith("andromeda: ")
    assert said.endswith("and call again.\n")
    assert said.count("\n") == 1
