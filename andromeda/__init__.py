"""Andromeda: a long-context language model that you train, stretch, measure and serve yourself.

`from andromeda import Andromeda` is the model; importing the package alone loads no torch, so that the command line
starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Andromeda", "__version__"]

if TYPE_CHECKING:
    from andromeda.api import Andromeda


def __getattr__(name: str) -> Any:
    if name == "Andromeda":
        from andromeda.api import Andromeda

        return Andromeda
    raise AttributeError(f"module 'andromeda' has no attribute {name!r}")
