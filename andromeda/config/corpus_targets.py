"""What a head leaves open and its corpus says: the kind of the target, its labels, the mean and spread of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from andromeda.config.data import DataConfig
from andromeda.config.heads import HEAD_KINDS, KIND_OF_TARGET, RegressionConfig, TokenClassificationConfig, head_keys, target_name
from andromeda.config.model import HeadTable
from andromeda.config.run import RunConfig
from andromeda.config.vocabulary import MANIFEST
from andromeda.utils.errors import ConfigError
from andromeda.utils.untrusted import read_json_object

AUTO = "auto"


def with_corpus_targets(config: RunConfig) -> RunConfig:
    """The configuration with the heads' open keys filled in from the manifests of its corpora; unchanged where these say nothing.

    Raises ConfigError, one sentence, where the target fits more than one likelihood.
    """
    if not config.model.task_heads:
        return config
    known = _targets(config.data)
    heads = {name: _filled(name, table, known.get(target_name(name, table))) for name, table in config.model.task_heads.items()}
    return config.model_copy(update={"model": config.model.model_copy(update={"task_heads": heads})})


def _filled(name: str, table: HeadTable, target: Mapping[str, Any] | None) -> HeadTable:
    if target is None or (table.kind != AUTO and table.kind not in HEAD_KINDS):
        return table
    kind = _kind(name, target) if table.kind == AUTO else table.kind
    resolved = HeadTable.model_validate({**table.own, "kind": kind})
    keys = head_keys(name, resolved)
    own = dict(table.own)
    if isinstance(keys, TokenClassificationConfig) and not keys.num_labels:
        own["num_labels"] = len(target.get("labels", ()))
    if isinstance(keys, RegressionConfig) and not keys.scale and keys.likelihood != "poisson":
        own |= {"shift": _rounded(target.get("mean", 0.0)), "scale": _rounded(target.get("std", 1.0)) or 1.0}
    return HeadTable.model_validate({"kind": kind, **own})


def _kind(name: str, target: Mapping[str, Any]) -> str:
    """The kind of head that a target asks for."""
    kind = target.get("kind")
    if kind == "number" and target.get("whole"):
        raise ConfigError(
            f"The numbers of target {name!r} are all whole and may be classes, counts or quantities: set model.task_heads.{name}.kind = "
            f"'regression' with likelihood 'poisson' or 'gaussian', or build the corpus with --target {name}=label for classes."
        )
    if kind not in KIND_OF_TARGET:
        raise ConfigError(f"The corpus's target {name!r} is of no known kind ({kind!r}): build the corpus again.")
    return KIND_OF_TARGET[kind]


def _rounded(value: float) -> float:
    """Six digits are enough to standardize by, and are the same on every machine."""
    return float(f"{value:.6g}")


def _targets(data: DataConfig) -> dict[str, Any]:
    """Targets by name, of the first corpus that has each; what no manifest says is left to whoever opens the corpus."""
    found: dict[str, Any] = {}
    for folder in [data.corpus] if data.corpus else [source.path for source in data.sources]:
        try:
            targets = read_json_object(Path(folder).expanduser() / MANIFEST).get("targets", {})
        except (OSError, ValueError):
            continue
        if isinstance(targets, dict):
            found = {name: target for name, target in targets.items() if isinstance(target, dict)} | found
    return found
