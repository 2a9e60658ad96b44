"""What every configuration part has in common: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """A typed, frozen group of settings. Unknown keys and wrong types are errors, never guesses."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# TOML and JSON have only lists; the configuration holds tuples because it is frozen.
Strings = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(_tuple)]
