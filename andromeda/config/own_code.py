"""Classes of a user's own that a configuration names by `package.module:Class`: the one place that imports them, and only with consent.

A configuration may come from somebody else, and importing a module runs it. Reading, checking and resolving a configuration therefore
imports nothing. What builds a model or an optimizer asks `import_class`, which imports Andromeda's own classes for registered names,
and anything else only within `allow_code`: `--allow-code` on the command line, `allow_code=True` in Python.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from andromeda.config.model import MIXERS
from andromeda.config.train import OPTIMIZERS
from andromeda.utils.errors import ConfigError

FLAG = "--allow-code"
ALL = frozenset({"*"})
"""Consent to every class."""
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed_code", default=frozenset())
_registered = frozenset([*MIXERS.values(), *OPTIMIZERS.values()])


class CodeNotAllowed(ConfigError):
    """A class of a user's own that nobody consented to import."""

    def __init__(self, path: str, key: str) -> None:
        super().__init__(
            f"{key} names the class {path!r}, and importing it runs code that is not Andromeda's: if you trust it, add {FLAG} "
            "(in Python allow_code=True)."
        )


@contextmanager
def allow_code(allowed: bool | Iterable[str] = True) -> Iterator[None]:
    """Consent to import classes that configurations name, until the block ends; what was allowed before stays allowed.

    allowed: every class (True), none more than before (False), or those with these paths.
    """
    more = (ALL if allowed else frozenset()) if isinstance(allowed, bool) else frozenset(allowed)
    token = _allowed.set(_allowed.get() | more)
    try:
        yield
    finally:
        _allowed.reset(token)


def allow_code_from_here_on() -> None:
    """Consent to every class until the surrounding `allow_code` block ends: for an option that is read inside it."""
    _allowed.set(ALL)


def code_allowed() -> bool:
    """Whether somebody consented to every class."""
    return "*" in _allowed.get()


def is_allowed(path: str) -> bool:
    """Whether the class at `path` may be imported here: it is Andromeda's own and registered, or somebody consented."""
    return path in _registered or not _allowed.get().isdisjoint({"*", path})


def import_class(path: str, key: str) -> Any:
    """What `package.module:Class` names; Python modules in the current folder are found too.

    Raises CodeNotAllowed, before anything is imported, without consent; ConfigError naming the key where it cannot be imported.
    """
    if not is_allowed(path):
        raise CodeNotAllowed(path, key)
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    if path not in _registered and here not in sys.path:
        # An installed command does not search the folder it is run in, where a user's own module lies.
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises while it is imported
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{key} = {path!r} cannot be imported ({reason}): give package.module:Class, defined at the top of its module."
        ) from None


def find_class(path: str, key: str) -> Any:
    """The kind of module that `package.module:Class` names. Raises ConfigError naming the key, as `import_class` does."""
    found = import_class(path, key)
    if not (isinstance(found, type) and hasattr(found, "forward")):
        raise ConfigError(f"{key} = {path!r} is no class of modules with a `forward`: give package.module:Class of one.")
    return found
