"""What is wrong with given values, in one sentence: each key by the path that the user typed, with the mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from andromeda.config.aliases import NAMES
from andromeda.config.base import BaseConfig
from andromeda.config.keys import flatten, show, walk
from andromeda.utils.errors import ConfigError, nearest

P = TypeVar("P", bound=BaseConfig)

WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list",
    "model_type": "a table of keys",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}
"""What a value must be, by pydantic's name for the mistake."""

RENAMED = {
    "model.width": "model.hidden_size",
    "model.context": "model.max_seq_len",
    "model.attention.kv_heads": "model.attention.num_kv_heads",
    "model.attention.heads": "model.attention.num_heads",
    "model.attention.mechanism": "model.attention.mixer",
    "model.attention.window": "model.attention.sliding_window",
    "model.attention.global_every": "model.attention.full_attention_interval",
    "model.feedforward.hidden": "model.feedforward.intermediate_size",
    "model.feedforward.mult": "model.feedforward.mlp_ratio",
    "model.experts.count": "model.experts.num_experts",
    "model.experts.active": "model.experts.top_k",
    "model.experts.shared": "model.experts.num_shared_experts",
    "model.experts.score": "model.experts.router_activation",
    "model.experts.normalise": "model.experts.normalize",
    "model.experts.rate": "model.experts.bias_update_rate (balance bias) or model.experts.aux_loss_coef (balance loss)",
    "model.alibi.heads": "model.alibi.num_heads",
    "model.alibi.fold": "model.alibi.fold_into_qk",
    "model.rotary.scaling.original_context": "model.rotary.scaling.original_max_seq_len",
    "train.sequence": "train.seq_len",
    "train.batch": "train.batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.checkpointing": "train.activation_checkpointing",
    "train.guard": "train.spike_guard",
    "train.schedule.final": "train.schedule.min_lr_ratio",
    "train.log.health": "train.log.diagnostics_every",
}
"""Keys of version 0.1 and what they are called now; remove after one release."""

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


def unknown(path: str, known: Sequence[str]) -> str:
    """The clause for a key that is not among the known paths, with the one that was probably meant."""
    plain = re.sub(r"\[\d+\]", "[]", path)
    if plain in RENAMED:
        return f"{path} is now called {RENAMED[plain]}"
    table, _, name = plain.rpartition(".")
    elsewhere = [f"model.{name}"] if name in NAMES else [other for other in known if other.rpartition(".")[2] == name]
    if 1 <= len(elsewhere) <= 2:
        return f"there is no key {path} (did you mean {' or '.join(elsewhere)}?)"
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == table]
    hint = nearest(name, [*siblings, *(NAMES if table == "model" else ())])
    if hint and table:
        hint = hint.replace("mean ", f"mean {path.rpartition('.')[0]}.")
    return f"there is no key {path}" + (hint or nearest(plain, known))


def _clause(finding: Any, prefix: str, spelled: Mapping[str, str], known: Sequence[str]) -> str:
    path = _path(finding["loc"], prefix)
    name = _name(path, spelled)
    kind, context, value = finding["type"], finding.get("ctx", {}), finding["input"]
    if kind == "extra_forbidden":
        return unknown(path, known)
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
