"""Functions that torch.compile calls while it traces, and whose result it takes as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result` without its import of the compiler, which takes a second that most commands do not need.

    The mark is the one that PyTorch sets (torch/_dynamo/decorators.py); a test compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
