"""Andromeda: a long-context language model that you train, extend, measure and share yourself.

`from andromeda import Andromeda` is the model; importing the package alone loads no torch, so that the command line
starts at once.
"""

import typing as _typing

__version__ = "0.1.0"
__all__ = ["Andromeda", "__version__"]

if _typing.TYPE_CHECKING:
    from andromeda.api import Andromeda


def __getattr__(name: str) -> _typing.Any:
    if name == "Andromeda":
        from andromeda.api import Andromeda

        return Andromeda
    raise AttributeError(f"module 'andromeda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
