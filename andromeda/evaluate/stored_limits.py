"""How much work a stored result may ask of whoever verifies it: its settings come from a file that may be somebody else's."""

from __future__ import annotations

from math import prod
from typing import Any

from andromeda.config.base import BaseConfig

MOST: dict[str, int] = {"samples": 10_000, "windows": 100_000, "places": 100_000, "targets": 65_536, "shots": 1_000}
"""Of each setting that counts problems, windows or targets."""
MOST_DEPTHS = 1_000
MOST_CONTEXTS = 64
"""Lengths, relative to the context of the model."""
LEAST_STRIDE = 1_024
"""Windows of so many tokens must score one more at least."""
MOST_TOKENS = 1 << 30
"""That are read in all."""


def excess(settings: BaseConfig, context: int) -> str:
    """What of the settings is beyond these limits, as a clause; empty where nothing is. context: of the model, in tokens."""
    values = settings.model_dump()
    for name, most in MOST.items():
        if (values.get(name) or 0) > most:
            return f"it has {values[name]:,} {name}, and at most {most:,} are repeated"
    lengths = [n for name in ("context", "length", "lengths", "contexts") for n in _as_list(values.get(name))]
    if max(lengths, default=0) > MOST_CONTEXTS * context:
        return f"it has contexts of {max(lengths):,} tokens, and at most {MOST_CONTEXTS} times the model's {context:,} are repeated"
    if values.get("stride") and values["stride"] * LEAST_STRIDE < values["context"]:
        return f"its windows of {values['context']:,} tokens score {values['stride']:,} each, which is too much to repeat"
    counts = [values.get(name) or 1 for name in ("samples", "windows", "places")]
    depths = len(values.get("depths") or [0])
    if depths > MOST_DEPTHS or sum(lengths) * depths * prod(counts) > MOST_TOKENS:
        return f"it reads more than {MOST_TOKENS:,} tokens, which is too much to repeat"
    return ""


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
