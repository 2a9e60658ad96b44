"""Every key that a configuration has, by its dotted path, and tables of values addressed by such paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from andromeda.config.base import BaseConfig
from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError


def iter_fields(part: type[BaseConfig], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each field below `part` with its dotted path, a table before the keys inside it; a list of tables is `name[]`."""
    for name, field in part.model_fields.items():
        yield prefix + name, field
        if inner := nested_config(field):
            yield from iter_fields(inner, f"{prefix}{name}{'' if inner is field.annotation else '[]'}.")


def nested_config(field: FieldInfo) -> type[BaseConfig] | None:
    """The part that a field holds, one or many of, when it is a table of keys."""
    for kind in (field.annotation, *get_args(field.annotation)[:1]):
        if isinstance(kind, type) and issubclass(kind, BaseConfig):
            return kind
    return None


@cache
def fields() -> dict[str, FieldInfo]:
    """All keys of a run's configuration, tables included, by dotted path."""
    return dict(iter_fields(RunConfig))


def is_text(path: str) -> bool:
    """Whether the key at a dotted path holds free text."""
    field = fields().get(path)
    return field is not None and field.annotation is str


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        # An empty table stays, so that one in the place of a plain value is found.
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return flat


def set_path(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path, creating the tables it is in. Raises ConfigError where one of them is a plain value."""
    *tables, last = path.split(".")
    for depth, name in enumerate(tables, 1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path} cannot be set together with {'.'.join(tables[:depth])}, which is a value and not a table: leave one of them out."
            )
    values[last] = value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`: tables are merged, everything else is replaced."""
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def format_value(value: Any) -> str:
    """A value as a user would write it, shortened."""
    if isinstance(value, Mapping | BaseConfig):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
