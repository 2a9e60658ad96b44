"""The small files of a run folder, beside what its newest checkpoint remembers of them and the corpus says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.config.keys import flatten
from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream, open_stream
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.comparison import Check, Places
from andromeda.train import checkpoint
from andromeda.train.metrics import Metrics, sha256_of_first
from andromeda.train.run_dir import RunFolder
from andromeda.train.trainer import is_free, stream_length
from andromeda.utils.errors import AndromedaError


def records(folder: RunFolder, metrics: Metrics, places: Places) -> Iterator[Check]:
    """The data that was trained on, checkpoints, configuration, metrics and tokenizer; what a run does not have is not checked."""
    state, config = _remembered(folder), folder.config()
    try:
        stream: TokenStream | AndromedaError = open_stream(places.data(config.data), stream_length(config), config.seed)
    except AndromedaError as error:
        stream = error
    yield from _data(folder, state, stream)
    if not isinstance(stream, AndromedaError):
        yield from _tokenizer(folder, metrics, stream)
    yield _checkpoints(folder)
    if "config" in state:
        yield _config(config, state)
    yield from _metrics(folder, metrics, state)


def _remembered(folder: RunFolder) -> dict[str, Any]:
    """What the newest checkpoint that can be read keeps beside tensors; nothing where there is none."""
    for path in checkpoint.listed(folder.checkpoints):
        try:
            values = checkpoint.read_values(path)
        except AndromedaError:
            continue
        kinds = {"config": dict, "cursor": dict, "metrics_bytes": int, "metrics_sha256": str}
        if all(isinstance(values.get(name, kind()), kind) for name, kind in kinds.items()):
            return values
    return {}


def _data(folder: RunFolder, state: dict[str, Any], stream: TokenStream | AndromedaError) -> Iterator[Check]:
    """The fingerprint of the training stream that manifest and checkpoint name."""
    manifest = folder.manifest()
    if not manifest and state.get("cursor", {}).get("step"):
        yield Check("manifest.json", "", "missing", None, 0.0, False, "there was one when the run was trained")
    stored = str(manifest.get("data") or state.get("data") or "")
    if not stored:
        yield Check("training data", "none named", "", None, 0.0, True, "the run tells of no training")
    elif isinstance(stream, AndromedaError):
        yield Check("training data", stored[:12], "missing", None, 0.0, False, f"{stream}")
    else:
        trained_on = str(state.get("data", stored))
        note = "" if trained_on == stored else f"the newest checkpoint was trained on {trained_on[:12]}"
        yield Check("training data", stored[:12], stream.fingerprint[:12], None, 0.0, stream.fingerprint == stored == trained_on, note)


def _tokenizer(folder: RunFolder, metrics: Metrics, stream: TokenStream) -> Iterator[Check]:
    """The run's beside its corpus's; shards from elsewhere may have had none, and then no bytes were counted."""
    kept = folder.path / "tokenizer"
    if not (kept.exists() or metrics.last("bits_per_byte")):
        return
    found = stream.tokenizer.fingerprint if stream.tokenizer else "none"
    try:
        stored = Tokenizer.load(kept).fingerprint
    except AndromedaError as error:
        yield Check("tokenizer", "missing", found[:12], None, 0.0, False, f"{error}")
    else:
        yield Check("tokenizer", stored[:12], found[:12], None, 0.0, stored == found, "" if stored == found else "another than the data's")


def _checkpoints(folder: RunFolder) -> Check:
    """Whether each file of each checkpoint still has the hash that it was written with."""
    kept = checkpoint.listed(folder.checkpoints)
    reasons = [f"step {int(path.name[5:])}: {reason}" for path in kept if (reason := checkpoint.damage(path)) and path.exists()]
    note = "; ".join(reasons) or ("" if kept else "there are no weights that could be checked")
    return Check("checkpoints", f"{len(kept)} kept", f"{len(kept) - len(reasons)} intact", None, 0.0, bool(kept) and not reasons, note)


def _config(config: RunConfig, state: dict[str, Any]) -> Check:
    """Whatever decides what is learned is as it was at the newest checkpoint."""
    old, new = flatten(state["config"]), flatten(json.loads(json.dumps(config.model_dump())))
    apart = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key] and not is_free(key)]
    note = f"{apart[0]} is {new[apart[0]]!r} and was {old[apart[0]]!r} in the newest checkpoint" if apart else ""
    return Check("config.toml", f"{len(old)} keys", f"{len(apart)} differ", None, 0.0, not apart, note)


def _metrics(folder: RunFolder, metrics: Metrics, state: dict[str, Any]) -> Iterator[Check]:
    """Lines that no one can read, and whether the file begins with what it held at the newest checkpoint."""
    size = state.get("metrics_bytes", 0)
    if metrics.broken and not _unfinished(folder.metrics_file, metrics):
        told = "1 line cannot be read" if metrics.broken == 1 else f"{metrics.broken} lines cannot be read"
        yield Check("metrics.jsonl", f"{len(metrics.lines) + metrics.broken} lines", f"{len(metrics.lines)} lines", None, 0.0, False, told)
    elif size:
        yield _written(folder.metrics_file, size, state.get("metrics_sha256"))


def _written(path: Path, size: int, sha256: str | None) -> Check:
    """That so many bytes are as they were; older checkpoints keep their number alone."""
    there = path.stat().st_size if path.is_file() else 0
    changed = there >= size and sha256 is not None and sha256_of_first(path, size) != sha256
    note = "changed since the newest checkpoint" if changed else "" if there >= size else "shorter than at the newest checkpoint"
    return Check("metrics.jsonl", f"{size} bytes", f"{there} bytes", None, 0.0, not note, note)


def _unfinished(path: Path, metrics: Metrics) -> bool:
    """Whether the one line that cannot be read is the last one, cut off by a kill."""
    return metrics.broken == 1 and not path.read_bytes().endswith(b"\n")
