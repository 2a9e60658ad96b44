"""Values checked against the types of a configuration; all errors in one sentence, each key under the name that the user typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from andromeda.config.base import BaseConfig
from andromeda.config.keys import flatten, format_value, iter_fields
from andromeda.config.model import NAME, TABLE
from andromeda.config.suggestions import unknown_key
from andromeda.utils.errors import ConfigError, nearest

P = TypeVar("P", bound=BaseConfig)

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list",
    "steps_or_fraction": "a whole number of steps, or a fraction of train.steps below 1, such as 0.1",
    "model_type": "a table of keys",
    "dict_type": "a table",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}
"""What a value must be, by pydantic's error type."""

MAX_NUMBER = 2**53
"""Up to here floats represent every whole number exactly."""


def validate(part: type[P], values: Mapping[str, Any], prefix: str = "", given_names: Mapping[str, str] | None = None) -> P:
    """The values as a typed part.

    prefix: dotted path of the part within a run. given_names: for a full dotted path, the name under which the user gave it.
    Raises ConfigError, one sentence for all errors.
    """
    check_magnitude(values, prefix, given_names)
    try:
        return part.model_validate(values)
    except ValidationError as invalid:
        known = [path for path, _ in iter_fields(part, prefix and f"{prefix}.")]
        raise ConfigError(join_clauses(_clause(error, prefix, given_names or {}, known) for error in invalid.errors())) from None


def check_magnitude(values: Mapping[str, Any], prefix: str = "", given_names: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError when a whole number is too large to compute with; arguments as in `validate`."""
    if huge := [path for path, value in flatten(values).items() if isinstance(value, int) and abs(value) > MAX_NUMBER]:
        raise ConfigError(join_clauses(f"{_name(f'{prefix}.{path}'.lstrip('.'), given_names or {})} must be at most 2^53" for path in huge))


def join_clauses(clauses: Iterable[str]) -> str:
    """Clauses that each name a key, joined to one sentence."""
    return " ".join("; ".join(dict.fromkeys(clauses)).split()) + "."


def _clause(error: Any, prefix: str, given_names: Mapping[str, str], known: Sequence[str]) -> str:
    path = _path(error["loc"], prefix)
    name = _name(path, given_names)
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return unknown_key(path, known, value)
    if kind == "missing":
        return f"{name} is missing"
    if kind == "too_long":
        return f"{name} must have {context['max_length']} values, not {context['actual_length']}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"{name} must be one of {', '.join(allowed)}, not {format_value(value)}{nearest(str(value), allowed)}"
    if kind not in EXPECTED:
        return f"{name} is not valid, {error['msg'].lower()}"
    return f"{name} must be {EXPECTED[kind].format(**context)}, not {format_value(value)}"


def _name(path: str, given_names: Mapping[str, str]) -> str:
    """The name under which the user gave the key at a path; for an item of a list, the list's name without the index."""
    return given_names.get(path) or given_names.get(re.sub(r"\[\d+\]$", "", path)) or path


def _path(location: tuple[int | str, ...], prefix: str) -> str:
    path = prefix
    for part in location:
        if part in (NAME, TABLE):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
