"""How a part is split over N processes, as the part itself says: `tensor_plan(N)`. Nothing here or in a part knows of processes.

A part with a plan computes a share of its output from its share of the parameters; the sum of the shares is the output. A part without
one is computed whole by every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from andromeda.model.specs import states
from andromeda.utils.errors import ConfigError


class TensorPlan(NamedTuple):
    """What changes in a part of which each of N processes computes a share."""

    split: Mapping[str, int] = {}
    """Parameters, by their names below the part, and the dimension along which each process has one of N equal pieces. All others are
    whole on every process."""
    shares: tuple[str, ...] = ()
    """Parameters and numbers, by their names, that enter the sum of the shares N times, and are therefore divided by N."""

    def below(self, name: str) -> TensorPlan:
        """The same with names that begin with `name.`."""
        return TensorPlan({f"{name}.{path}": dim for path, dim in self.split.items()}, tuple(f"{name}.{path}" for path in self.shares))

    def __or__(self, other: TensorPlan) -> TensorPlan:
        """Both."""
        return TensorPlan({**self.split, **other.split}, self.shares + other.shares)


class SumOfShares(Protocol):
    """The sum of a part's shares, for code that calls the layers of a part and not the part: in inference, without gradients."""

    is_first: bool
    """Whether this share has what enters the sum once, such as the residual stream."""

    def __call__(self, share: Tensor) -> Tensor:
        """The sum."""
        ...


def sum_of_shares(part: nn.Module) -> SumOfShares | None:
    """What sums the shares of a part that is split for inference; None of a part that is whole."""
    found: SumOfShares | None = getattr(part, "sum_of_shares", None)
    return found


def has_plan(part: nn.Module) -> bool:
    """Whether the part says how it is split, for what its own class computes (see `specs.states`)."""
    return states(part, "tensor_plan")


def plan_of(part: Any, count: int, needed_by: str = "") -> TensorPlan:
    """The plan of a part below another one, which `needed_by` names and which cannot be split without it. Raises ConfigError."""
    if has_plan(part):
        plan: TensorPlan = part.tensor_plan(count)
        return plan
    if any(True for _ in part.parameters()):
        raise ConfigError(f"parallel.tensor = {count} cannot split {needed_by}: {type(part).__name__} does not say how (tensor_plan).")
    return TensorPlan()


def check_divides(count: int, size: int, what: str) -> None:
    """Raise ConfigError where `size` is no multiple of `count`."""
    if size % count:
        raise ConfigError(f"parallel.tensor = {count} does not divide {what} ({size}): choose a divisor of it.")


def splits_kv_heads(count: int, kv_heads: int) -> bool:
    """Whether key/value heads are split; a single one is whole on every process. Raises ConfigError for numbers between."""
    if kv_heads == 1:
        return count == 1
    check_divides(count, kv_heads, "model.attention.num_kv_heads")
    return True
