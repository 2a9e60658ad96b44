"""Command lines of benchmarks that are programs of their own."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End with the sentence and exit code 2."""
        self.exit(2, f"andromeda: {message}: see `{self.prog} --help`.\n")
