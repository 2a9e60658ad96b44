"""Where exchangeable parts are found by name: built-in ones register themselves, a user's own are `package.module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from andromeda.errors import ConfigError, nearest

_MECHANISMS: dict[str, Callable[..., Any]] = {}


def mechanism(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an attention mechanism: a module built as `Class(config, layer)` and called as `part(x, ctx)`."""

    def register(part: Callable[..., Any]) -> Callable[..., Any]:
        _MECHANISMS[name] = part
        return part

    return register


def find_mechanism(name: str) -> Callable[..., Any]:
    """A registered attention mechanism, or a user's own class."""
    if ":" in name:
        return load_class(name, "attention.mechanism")
    if name not in _MECHANISMS:
        raise ConfigError(
            f"There is no attention mechanism {name!r}{nearest(name, _MECHANISMS)}; register it or give package.module:Class."
        )
    return _MECHANISMS[name]


def load_class(path: str, key: str) -> Callable[..., Any]:
    """The class that `package.module:Class` names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.{key} = {path!r} cannot be imported ({error}); give package.module:Class on the Python path.") from None
