"""What every configuration part has in common: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class BaseConfig(BaseModel):
    """A typed, frozen group of settings. Unknown keys and wrong types are errors, never guesses."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def as_tuple(value: Any) -> Any:
    """A list as a tuple; anything else as it came."""
    return tuple(value) if isinstance(value, list) else value


# TOML and JSON have only lists; the configuration holds tuples because it is frozen.
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
