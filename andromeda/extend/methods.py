"""How a model's positions are stretched: a pure function from a configuration to the one of a longer context.

Rotary positions by one of four rules (model/position/scaling.py); xPos's decay is stretched by the same rule as its
angles. ALiBi's slopes are divided by how much longer the context becomes, as position interpolation divides positions:
with a rotary method on a model that has both, or alone. Dynamic NTK promises that short sequences stay what they were,
so it leaves ALiBi, which reads on by itself, as it is.
"""

from __future__ import annotations

from andromeda.config.derived import original_max_seq_len
from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError, nearest

ROTARY = {"yarn": "yarn", "ntk": "ntk", "pi": "linear", "dynamic-ntk": "dynamic"}
"""Methods that scale rotary frequencies, and the rule's name in the configuration."""
METHODS = (*ROTARY, "alibi-scale", "none")


def trained_context(config: RunConfig) -> int:
    """Tokens of the rows that a run was trained on."""
    return config.train.seq_len or config.model.max_seq_len


def position_overrides(old: RunConfig, to: int, method: str) -> list[str]:
    """The changes `key.path=value` that make a model of `old` read `to` tokens by `method`.

    Raises ConfigError where the model has nothing that the method could stretch.
    """
    _refuse(old, to, method)
    changes = [f"model.max_seq_len={to}"]
    if method in ROTARY:
        changes += _scaling(old, to, ROTARY[method])
    if method != "none" and method != "dynamic-ntk" and old.model.alibi.num_heads:
        changes.append(f"model.alibi.scale={old.model.alibi.scale * to / trained_context(old)}")
    return changes


def applicable_methods(old: RunConfig) -> list[str]:
    """The methods that have something to stretch in a model of `old`; `none` always does."""
    kept = [method for method in METHODS if method in ROTARY and old.model.rotary.kind != "none"]
    return [*kept, *["alibi-scale"] * bool(old.model.alibi.num_heads), "none"]


def parse_methods(text: str, old: RunConfig) -> list[str]:
    """The methods that a user names: one, several with commas, or `all` that apply. Raises ConfigError for an unknown one."""
    names = applicable_methods(old) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"There is no method {name!r}{nearest(name, METHODS)}: give all, {', '.join(METHODS)}.")
    if not names:
        raise ConfigError(f"Name a method to extend by: all, {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def _scaling(old: RunConfig, to: int, kind: str) -> list[str]:
    before = old.model.rotary.scaling
    # A run that was extended already is stretched anew from the context that its frequencies were first trained on.
    original = trained_context(old) if before.kind == "none" else original_max_seq_len(old.model)
    # Dynamic NTK reads its factor off the length of each sequence; one of its own would stretch short ones too.
    factor = 1.0 if kind == "dynamic" else to / original
    keys = {"kind": kind, "factor": factor, "original_max_seq_len": original}
    return [f"model.rotary.scaling.{key}={value}" for key, value in keys.items()]


def _refuse(old: RunConfig, to: int, method: str) -> None:
    model = old.model
    if to <= trained_context(old):
        raise ConfigError(f"The run was trained on {trained_context(old)} tokens already: give --to more than that, not {to}.")
    if model.embedding.absolute:
        raise ConfigError(
            f"The model has a learned vector for each of its {model.max_seq_len} positions (model.embedding.absolute) and none beyond: "
            "train one with rotary positions or ALiBi to extend it."
        )
    if method in ROTARY and model.rotary.kind == "none":
        raise ConfigError(
            f"Method {method} scales rotary frequencies, and the model has none: use {' or '.join(applicable_methods(old))} with --method."
        )
    if method == "alibi-scale" and not model.alibi.num_heads:
        raise ConfigError(f"Method alibi-scale divides ALiBi's slopes, and the model has none: use {' or '.join(applicable_methods(old))}.")
