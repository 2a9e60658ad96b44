"""What is wrong with given values, in one sentence: each key by the path that the user typed, with the mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from andromeda.config.base import BaseConfig
from andromeda.config.keys import flatten, show, walk
from andromeda.config.suggestions import unknown_key
from andromeda.utils.errors import ConfigError, nearest

P = TypeVar("P", bound=BaseConfig)

WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list",
    "steps_or_fraction": "a whole number of steps, or a fraction of train.steps below 1, such as 0.1",
    "model_type": "a table of keys",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}
"""What a value must be, by pydantic's name for the mistake."""

LARGEST_NUMBER = 2**53
"""Up to here a whole number is also a floating-point number, so that nothing that is computed from it can overflow."""


def read(part: type[P], values: Mapping[str, Any], prefix: str = "", spelled: Mapping[str, str] | None = None) -> P:
    """The values as a typed part.

    prefix: dotted path of the part within a run. spelled: for a full dotted path, the name under which the user gave it.
    Raises ConfigError, one sentence for all mistakes.
    """
    refuse_huge(values, prefix, spelled)
    try:
        return part.model_validate(values)
    except ValidationError as error:
        known = [path for path, _ in walk(part, prefix and f"{prefix}.")]
        raise ConfigError(sentence(_clause(finding, prefix, spelled or {}, known) for finding in error.errors())) from None


def refuse_huge(values: Mapping[str, Any], prefix: str = "", spelled: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError when a whole number is too large to be computed with; arguments as in `read`."""
    if huge := [path for path, value in flatten(values).items() if isinstance(value, int) and abs(value) > LARGEST_NUMBER]:
        raise ConfigError(sentence(f"{_name(f'{prefix}.{path}'.lstrip('.'), spelled or {})} must be at most 2^53" for path in huge))


def sentence(clauses: Iterable[str]) -> str:
    """Clauses that each name a key, joined to one sentence."""
    return " ".join("; ".join(dict.fromkeys(clauses)).split()) + "."


def _clause(finding: Any, prefix: str, spelled: Mapping[str, str], known: Sequence[str]) -> str:
    path = _path(finding["loc"], prefix)
    name = _name(path, spelled)
    kind, context, value = finding["type"], finding.get("ctx", {}), finding["input"]
    if kind == "extra_forbidden":
        return unknown_key(path, known, value)
    if kind == "missing":
        return f"{name} is missing"
    if kind == "too_long":
        return f"{name} must have {context['max_length']} values, not {context['actual_length']}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"{name} must be one of {', '.join(allowed)}, not {show(value)}{nearest(str(value), allowed)}"
    if kind not in WANTED:
        return f"{name} is not valid, {finding['msg'].lower()}"
    return f"{name} must be {WANTED[kind].format(**context)}, not {show(value)}"


def _name(path: str, spelled: Mapping[str, str]) -> str:
    """What the user called the key at a path. Who gave a list by one name knows no numbers of its items."""
    return spelled.get(path) or spelled.get(re.sub(r"\[\d+\]$", "", path)) or path


def _path(location: tuple[int | str, ...], prefix: str) -> str:
    path = prefix
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
