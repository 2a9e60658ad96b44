"""The files of a run folder compared with what its newest checkpoint and its corpus say of them, and its held-out loss measured again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.config.data import DataConfig
from andromeda.config.keys import flatten
from andromeda.config.own_code import CodeNotAllowed
from andromeda.config.run import RunConfig
from andromeda.data.corpus import MANIFEST_NAME, verify_corpus
from andromeda.data.loader import TokenStream, open_stream
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.comparison import TOLERANCE, DataLocations, VerificationCheck, relative_difference, same_arithmetic, use_threads
from andromeda.train import checkpoint
from andromeda.train.build_objective import measuring_objective
from andromeda.train.callbacks.validation import ROW_SELECTION
from andromeda.train.manifest import device_name, machine, versions
from andromeda.train.metrics import MetricsHistory, is_number, sha256_prefix
from andromeda.train.precision import build_precision
from andromeda.train.resume import METRICS_LOST, changed_since
from andromeda.train.run_dir import RunDir
from andromeda.train.state import resolve_device
from andromeda.train.trainer import build_validation, resolve_seq_len
from andromeda.train.weights import load_weights
from andromeda.utils.errors import AndromedaError
from andromeda.utils.untrusted import MAX_LINE_BYTES, MalformedFile, open_regular


def check_run_files(folder: RunDir, metrics: MetricsHistory, locations: DataLocations) -> Iterator[VerificationCheck]:
    """The data that was trained on, checkpoints, configuration, metrics and tokenizer; what a run does not have is not checked."""
    state, config = _remembered(folder), folder.config()
    try:
        stream: TokenStream | AndromedaError = open_stream(locations.data(config.data), resolve_seq_len(config), config.seed)
    except AndromedaError as error:
        stream = error
    trained = bool(metrics.records or state.get("cursor", {}).get("step"))
    yield from _data(folder, state, stream, trained)
    if not isinstance(stream, AndromedaError):
        yield from _tokenizer(folder, metrics, stream)
        yield from _corpora(locations.data(config.data))
    yield _checkpoints(folder)
    if metrics.records and "cursor" not in state and checkpoint.list_all(folder.checkpoints):
        note = "the newest checkpoint holds no state of the training that metrics.jsonl records"
        yield VerificationCheck("state of training", "", "missing", None, 0.0, False, note)
    if "config" in state:
        yield _config(config, state)
    yield from _metrics(folder, metrics, state)


def _remembered(folder: RunDir) -> dict[str, Any]:
    """What the newest checkpoint that can be read keeps besides tensors; empty where there is none."""
    for path in checkpoint.list_all(folder.checkpoints):
        try:
            values = checkpoint.read_metadata(path)
        except AndromedaError:
            continue
        kinds = {"config": dict, "cursor": dict, "metrics_bytes": int, "metrics_sha256": str}
        if all(isinstance(values.get(name, kind()), kind) for name, kind in kinds.items()):
            return values
    return {}


def _data(folder: RunDir, state: dict[str, Any], stream: TokenStream | AndromedaError, trained: bool) -> Iterator[VerificationCheck]:
    """The fingerprint of the training stream that manifest and checkpoint name. trained: whether anything records a training."""
    manifest = folder.manifest()
    if not manifest and state.get("cursor", {}).get("step"):
        yield VerificationCheck("manifest.json", "", "missing", None, 0.0, False, "there was one when the run was trained")
    stored = str(manifest.get("data") or state.get("data") or "")
    if not stored:
        note = "the run was trained, and neither manifest nor checkpoint names its data" if trained else "the run records no training"
        yield VerificationCheck("training data", "none named", "", None, 0.0, not trained, note)
    elif isinstance(stream, AndromedaError):
        yield VerificationCheck("training data", stored[:12], "missing", None, 0.0, False, f"{stream}")
    else:
        trained_on = str(state.get("data", stored))
        note = "" if trained_on == stored else f"the newest checkpoint was trained on {trained_on[:12]}"
        yield VerificationCheck(
            "training data", stored[:12], stream.fingerprint[:12], None, 0.0, stream.fingerprint == stored == trained_on, note
        )


def _corpora(data: DataConfig) -> Iterator[VerificationCheck]:
    """The shards of every corpus that has a manifest with their hashes."""
    for path in [data.corpus, *(source.path for source in data.sources)]:
        if not path or not (Path(path) / MANIFEST_NAME).is_file():
            continue
        try:
            documents = sum(split.documents for split in verify_corpus(Path(path)).splits.values())
            yield VerificationCheck("shards", f"{documents} documents", "intact", None, 0.0, True)
        except (AndromedaError, MalformedFile, OSError) as error:
            yield VerificationCheck("shards", "", "", None, 0.0, False, f"{error}")


def _tokenizer(folder: RunDir, metrics: MetricsHistory, stream: TokenStream) -> Iterator[VerificationCheck]:
    """The run's compared with its corpus's; shards made elsewhere may have had none, and then no bytes were counted."""
    kept = folder.path / "tokenizer"
    if not (kept.exists() or metrics.latest("bits_per_byte")):
        return
    found = stream.tokenizer.fingerprint if stream.tokenizer else "none"
    try:
        stored = Tokenizer.load(kept).fingerprint
    except AndromedaError as error:
        yield VerificationCheck("tokenizer", "missing", found[:12], None, 0.0, False, f"{error}")
    else:
        yield VerificationCheck(
            "tokenizer", stored[:12], found[:12], None, 0.0, stored == found, "" if stored == found else "another than the data's"
        )


def _checkpoints(folder: RunDir) -> VerificationCheck:
    """Whether each file of each checkpoint still has the hash that it was written with."""
    kept = checkpoint.list_all(folder.checkpoints)
    reasons = [f"step {int(path.name[5:])}: {reason}" for path in kept if (reason := _damage(path)) and path.exists()]
    note = "; ".join(reasons) or ("" if kept else "there are no weights that could be checked")
    return VerificationCheck(
        "checkpoints", f"{len(kept)} kept", f"{len(kept) - len(reasons)} intact", None, 0.0, bool(kept) and not reasons, note
    )


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or with the values in its state.json."""
    try:
        reason = checkpoint.find_damage(path)
        if reason is None:
            checkpoint.read_metadata(path)
        return reason
    except AndromedaError as error:
        return str(error)


def _config(config: RunConfig, state: dict[str, Any]) -> VerificationCheck:
    """Whatever decides what is learned is as it was at the newest checkpoint."""
    apart = changed_since(config, state["config"])
    note = f"at the newest checkpoint {apart[0]}" if apart else ""
    return VerificationCheck("config.toml", f"{len(flatten(state['config']))} keys", f"{len(apart)} differ", None, 0.0, not apart, note)


def _metrics(folder: RunDir, metrics: MetricsHistory, state: dict[str, Any]) -> Iterator[VerificationCheck]:
    """Lines that no one can read, and whether the file begins with what it held at the newest checkpoint."""
    for record in metrics.records:
        if str(record.get("event", "")).startswith(METRICS_LOST):
            yield VerificationCheck("metrics.jsonl", "", "", None, 0.0, False, f"step {record['step']}: {record['event']}")
    if metrics.num_unreadable and not _unfinished(folder.metrics_file, metrics):
        note = "1 line cannot be read" if metrics.num_unreadable == 1 else f"{metrics.num_unreadable} lines cannot be read"
        yield VerificationCheck(
            "metrics.jsonl",
            f"{len(metrics.records) + metrics.num_unreadable} lines",
            f"{len(metrics.records)} lines",
            None,
            0.0,
            False,
            note,
        )
    elif metrics.records or state.get("metrics_bytes", 0) > 0:
        yield from _remembered_metrics(folder.metrics_file, state)


def _remembered_metrics(path: Path, state: dict[str, Any]) -> Iterator[VerificationCheck]:
    """That the bytes which the newest checkpoint knows are as they were; whatever comes after them nobody can vouch for."""
    size, sha256 = max(state.get("metrics_bytes", 0), 0), state.get("metrics_sha256")
    there = path.stat().st_size if path.is_file() else 0
    if not size or not sha256:
        why = "the newest checkpoint does not hold what the file held then" if state else "no checkpoint holds what the file held"
        yield VerificationCheck.not_checked("metrics.jsonl", f"{there} bytes", why)
        return
    shorter, changed = there < size, there >= size and sha256_prefix(path, size) != sha256
    note = "changed since the newest checkpoint" if changed else "shorter than at the newest checkpoint" if shorter else ""
    yield VerificationCheck("metrics.jsonl", f"{size} bytes", f"{there} bytes", None, 0.0, not note, note)
    if not changed and _whole_lines_after(path, size):
        why = "written after the newest checkpoint, which does not know them: resume the run, and they are written again"
        yield VerificationCheck.not_checked("metrics.jsonl, later lines", f"{there - size} bytes", why)


def _whole_lines_after(path: Path, size: int) -> bool:
    """Whether more lines follow the first `size` bytes; one that a kill cut off is none."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        file.seek(size)
        return b"\n" in file.read(MAX_LINE_BYTES + 1)


def _unfinished(path: Path, metrics: MetricsHistory) -> bool:
    """Whether the one line that cannot be read is the last one, cut off by a kill."""
    if metrics.num_unreadable != 1:
        return False
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1))
        return file.read(1) != b"\n"


HELD_OUT, AVERAGE = "validation/", "_average"
NAME = HELD_OUT + "loss"


def check_held_out_loss(folder: RunDir, metrics: MetricsHistory, locations: DataLocations, device: str) -> Iterator[VerificationCheck]:
    """The newest held-out figures in metrics.jsonl whose checkpoint is kept; nothing where there are none."""
    kept = {int(path.name.removeprefix("step-")): path for path in checkpoint.list_all(folder.checkpoints)}
    lines = [line for line in metrics.records if is_number(line.get(NAME)) and line["step"] in kept]
    if lines:
        yield _held_out(folder, lines[-1], kept[lines[-1]["step"]], locations, device)


def _held_out(folder: RunDir, line: dict[str, Any], kept: Path, locations: DataLocations, device: str) -> VerificationCheck:
    what, start = f"held-out loss of step {line['step']}", last_start(folder, line["step"])
    stored = {name: figure for name, figure in line.items() if name.startswith(HELD_OUT)}
    shown = f"{stored[NAME]:.6g}"
    try:
        state = checkpoint.read_metadata(kept)
        if state.get("validation") != ROW_SELECTION:
            why = "its checkpoint does not say that this version's sequences were measured; the results of `andromeda eval` are compared"
            return VerificationCheck.not_checked(what, shown, why)
        with use_threads(start.get("machine")):
            # How the start computed is known but for its precision, which its configuration decides on equal machines alike.
            exact = repeats_exactly(start, device)
            then = _table(_table(state.get("config")).get("train"))
            average = any(name.endswith(AVERAGE) for name in stored)
            found, precision = _measure(folder, line["step"], then, locations, device, average)
    except CodeNotAllowed as error:
        return VerificationCheck.not_checked(what, shown, str(error))
    except AndromedaError as error:
        return VerificationCheck(what, shown, "missing", None, 0.0, False, f"{error}")
    loose = 0.0 if exact else TOLERANCE.get(precision, 5e-2)
    # More may be found than was stored: bytes are counted where a tokenizer came later.
    apart = {name: relative_difference(figure, found.get(name)) for name, figure in stored.items()}
    worst = max(sorted(apart), key=apart.__getitem__)
    note = "equal to the last bit" if apart[worst] == 0 else "" if worst == NAME else f"largest difference at {worst}"
    return VerificationCheck(
        what, shown, f"{found[NAME]:.6g}" if found else "nothing held out", apart[worst], loose, apart[worst] <= loose, note
    )


def last_start(folder: RunDir, step: int | None = None) -> dict[str, Any]:
    """The newest start of the run that its manifest records, or the one that took a step; an empty one where it records none."""
    known = [start for start in folder.manifest().get("starts", []) if isinstance(start, dict)]
    before = [start for start in known if step is None or (is_number(start.get("step")) and start["step"] < step)]
    return (before or known or [{}])[-1]


def repeats_exactly(start: dict[str, Any], device: str) -> bool:
    """Whether sums are computed here in the order that a start computed them in."""
    now = {"device": device_name(resolve_device(device, "device")), **machine()}
    old = {**_table(start.get("machine")), "device": start.get("device")}
    return same_arithmetic(old, now, _table(start.get("versions")), versions())


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measure(
    folder: RunDir, step: int, then: dict[str, Any], locations: DataLocations, device: str, average: bool
) -> tuple[dict[str, float], str]:
    """The held-out figures as training measures them, of the averaged weights too if asked for, and the precision.

    then: the settings of training at that step; a later start may have been given others.
    """
    config, place = folder.config(), resolve_device(device, "device")
    train = config.train.model_copy(
        update={key: then[key] for key in ("eval_tokens", "micro_batch_size") if isinstance(then.get(key), int)}
    )
    validation = build_validation(config.model_copy(update={"train": train, "data": locations.data(config.data)}))
    precision = build_precision(train.precision, place)

    def figures(average: bool) -> dict[str, float]:
        model = precision.convert_model(load_weights(folder.path, step=step, average=average, device=place))
        return validation(model, measuring_objective(model, config), precision)

    averaged = {f"{name}{AVERAGE}": figure for name, figure in figures(True).items()} if average else {}
    return figures(False) | averaged, precision.name
