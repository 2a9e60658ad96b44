"""Context extension methods: from a configuration to the overrides for a longer context.

Rotary frequencies are scaled by one of four rules (model/position/scaling.py), and the decay of xPos by the same rule. ALiBi's
slopes are divided by the extension factor, as position interpolation divides positions: with a rotary method on a model that
has both, or alone. Dynamic NTK leaves short sequences unchanged, so it leaves ALiBi, which extrapolates by itself, unchanged too.
"""

from __future__ import annotations

from andromeda.config.derived import original_max_seq_len
from andromeda.config.run import RunConfig
from andromeda.utils.errors import ConfigError, nearest

ROTARY = {"yarn": "yarn", "ntk": "ntk", "pi": "linear", "dynamic-ntk": "dynamic"}
"""Methods that scale rotary frequencies, and the value of model.rotary.scaling.kind."""
METHODS = (*ROTARY, "alibi-scale", "none")


def trained_context(config: RunConfig) -> int:
    """Sequence length that a run was trained with."""
    return config.train.seq_len or config.model.max_seq_len


def position_overrides(old: RunConfig, to: int, method: str) -> list[str]:
    """The overrides `key.path=value` that extend a model of `old` to `to` tokens by `method`.

    Raises ConfigError if the model has no positions that the method could scale.
    """
    _refuse(old, to, method)
    changes = [f"model.max_seq_len={to}"]
    if method in ROTARY:
        changes += _scaling(old, to, ROTARY[method])
    if method != "none" and method != "dynamic-ntk" and old.model.alibi.num_heads:
        changes.append(f"model.alibi.scale={old.model.alibi.scale * to / trained_context(old)}")
    return changes


def applicable_methods(old: RunConfig) -> list[str]:
    """The methods that apply to a model of `old`; `none` always does."""
    kept = [method for method in METHODS if method in ROTARY and old.model.rotary.kind != "none"]
    return [*kept, *["alibi-scale"] * bool(old.model.alibi.num_heads), "none"]


def parse_methods(text: str, old: RunConfig) -> list[str]:
    """Methods from a user's text: one, several separated by commas, or `all` applicable ones. Raises ConfigError for an unknown one."""
    names = applicable_methods(old) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"There is no method {name!r}{nearest(name, METHODS)}: give all, {', '.join(METHODS)}.")
    if not names:
        raise ConfigError(f"Name a method: all, {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def _scaling(old: RunConfig, to: int, kind: str) -> list[str]:
    before = old.model.rotary.scaling
    # A run that was extended before is scaled relative to the context of its original training.
    original = trained_context(old) if before.kind == "none" else original_max_seq_len(old.model)
    # Dynamic NTK computes its factor from the length of each sequence; a constant one would scale short sequences too.
    factor = 1.0 if kind == "dynamic" else to / original
    keys = {"kind": kind, "factor": factor, "original_max_seq_len": original}
    return [f"model.rotary.scaling.{key}={value}" for key, value in keys.items()]


def _refuse(old: RunConfig, to: int, method: str) -> None:
    model = old.model
    if to <= trained_context(old):
        raise ConfigError(f"The run was trained on {trained_context(old)} tokens already: give --to more than that, not {to}.")
    if model.embedding.absolute:
        raise ConfigError(
            f"The model has a learned vector for each of its {model.max_seq_len} positions (model.embedding.absolute) and none for "
            "longer contexts: train one with rotary positions or ALiBi to extend it."
        )
    if method in ROTARY and model.rotary.kind == "none":
        raise ConfigError(
            f"Method {method} scales rotary frequencies, and the model has none: use {' or '.join(applicable_methods(old))} with --method."
        )
    if method == "alibi-scale" and not model.alibi.num_heads:
        raise ConfigError(f"Method alibi-scale divides ALiBi's slopes, and the model has none: use {' or '.join(applicable_methods(old))}.")
