"""The one family of errors that a user is meant to read.

Every error that bad input can cause is an `AndromedaError` whose message is one sentence: what is wrong and how to fix
it. The command line prints that sentence and exits with 2; a traceback means a defect of ours, never of the input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AndromedaError(Exception):
    """Bad input of any kind; `str(error)` is the one sentence that the user sees."""

    exit_code = 2
    told = False
    """Whether another process of the same run tells the user."""


class ConfigError(AndromedaError):
    """A configuration that cannot be read, or whose parts do not fit together."""


class DataError(AndromedaError):
    """A corpus, tokenizer or shard that cannot be read or does not match its fingerprint."""


class CheckpointError(AndromedaError):
    """A run folder or checkpoint that is missing, truncated or of another model."""


class RequestError(AndromedaError):
    """A prompt or a generation setting that cannot be served."""


class Interrupted(AndromedaError):
    """Ctrl-C, where nothing was left to save."""

    exit_code = 130


class MissingExtra(AndromedaError):
    """An optional library that is not installed; the sentence names the command that installs it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}: run `pip install 'andromeda[{extra}]'`.")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known word closest to a misspelt one, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
