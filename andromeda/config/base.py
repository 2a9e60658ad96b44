"""What every configuration part has in common: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class BaseConfig(BaseModel):
    """A typed, frozen group of settings. Unknown keys and wrong types are errors, never guesses."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __hash__(self) -> int:
        """Of the values as JSON: a part of the user's own may have a table among its values, which has no hash."""
        return hash(self.model_dump_json())


def as_tuple(value: Any) -> Any:
    """A list as a tuple; anything else as it came."""
    return tuple(value) if isinstance(value, list) else value


def steps_or_fraction(value: Any) -> int | float:
    """A count of steps as an int, a fraction of the run as a float below 1."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value < 1.0:
        return value
    raise PydanticCustomError("steps_or_fraction", "a number of steps, or a fraction of train.steps below 1")


StepsOrFraction = Annotated[int | float, BeforeValidator(steps_or_fraction)]
# TOML and JSON have only lists; the configuration holds tuples because it is frozen.
StringTuple = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
FloatPair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
