"""The command line, called as a user calls it but in this process."""

from __future__ import annotations

import sys

import pytest

from andromeda.cli.main import main


def call(*arguments: str) -> int:
    """`andromeda ARGUMENTS`; its exit code."""
    before, sys.argv = sys.argv, ["andromeda", *arguments]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return int(end.value.code or 0)
