"""What a run wrote down while it trained, beside what its checkpoints and its configuration give now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.data.loader import open_stream
from andromeda.errors import AndromedaError
from andromeda.evaluate.check import TOLERANCE, Check, Places, difference, same_arithmetic, threads
from andromeda.train import checkpoint
from andromeda.train.device import find_device
from andromeda.train.folder import RunFolder
from andromeda.train.history import Metrics, is_number, read_metrics
from andromeda.train.manifest import device_name, machine, versions
from andromeda.train.objective import NextToken
from andromeda.train.precision import build_precision
from andromeda.train.run import stream_length
from andromeda.train.validation import Validation
from andromeda.train.weights import load_weights

NAME = "validation/loss"


def training_data(run: Path, places: Places) -> Check:
    """The fingerprint of the training stream that the manifest names."""
    folder = RunFolder(run)
    stored, config = str(folder.manifest().get("data", "")), folder.config()
    if not stored:
        return Check("training data", "none named", "", None, 0.0, True, "the run has no manifest of its training")
    try:
        found = open_stream(places.data(config.data), stream_length(config), config.seed).fingerprint
    except AndromedaError as error:
        return Check("training data", stored[:12], "missing", None, 0.0, False, f"{error}")
    return Check("training data", stored[:12], found[:12], None, 0.0, found == stored)


def checkpoints(run: Path) -> Check:
    """Whether each file of each checkpoint still has the hash that it was written with."""
    kept = checkpoint.listed(RunFolder(run).checkpoints)
    reasons = [f"step {int(path.name[5:])}: {reason}" for path in kept if (reason := checkpoint.damage(path))]
    note = "; ".join(reasons) or ("" if kept else "there are no weights that could be checked")
    return Check("checkpoints", f"{len(kept)} kept", f"{len(kept) - len(reasons)} intact", None, 0.0, bool(kept) and not reasons, note)


def training_loss(run: Path, places: Places, device: str) -> Iterator[Check]:
    """The newest held-out loss in metrics.jsonl whose checkpoint is kept, and lines that no one can read; nothing where neither is."""
    folder = RunFolder(run)
    metrics = read_metrics(folder.metrics_file)
    if metrics.broken and not _unfinished(folder.metrics_file, metrics):
        told = "1 line cannot be read" if metrics.broken == 1 else f"{metrics.broken} lines cannot be read"
        yield Check("metrics.jsonl", f"{len(metrics.lines) + metrics.broken} lines", f"{len(metrics.lines)} lines", None, 0.0, False, told)
    kept = {int(path.name.removeprefix("step-")) for path in checkpoint.listed(folder.checkpoints)}
    lines = [line for line in metrics.lines if is_number(line.get(NAME)) and line["step"] in kept]
    if lines:
        yield _held_out(folder, lines[-1], places, device)


def _unfinished(path: Path, metrics: Metrics) -> bool:
    """Whether the one line that cannot be read is the last one, cut off by a kill."""
    return metrics.broken == 1 and not path.read_bytes().endswith(b"\n")


def _held_out(folder: RunFolder, line: dict[str, Any], places: Places, device: str) -> Check:
    what, stored, start = f"held-out loss of step {line['step']}", float(line[NAME]), last_start(folder)
    try:
        with threads(start.get("machine")):
            # How the start computed is known but for its precision, which its configuration decides on equal machines alike.
            exact = repeats_exactly(start, device)
            found, precision = _measure(folder, line["step"], places, device)
    except AndromedaError as error:
        return Check(what, f"{stored:.6g}", "missing", None, 0.0, False, f"{error}")
    loose = 0.0 if exact else TOLERANCE.get(precision, 5e-2)
    gap = difference(stored, found)
    return Check(what, f"{stored:.6g}", f"{found:.6g}", gap, loose, gap <= loose, "equal to the last bit" if gap == 0 else "")


def last_start(folder: RunFolder) -> dict[str, Any]:
    """The newest start of the run that its manifest tells of; an empty one where it tells of none."""
    starts = folder.manifest().get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else {}
    return last if isinstance(last, dict) else {}


def repeats_exactly(start: dict[str, Any], device: str) -> bool:
    """Whether sums are computed here in the order that a start computed them in."""
    now = {"device": device_name(find_device(device, "device")), **machine()}
    old = {**_table(start.get("machine")), "device": start.get("device")}
    return same_arithmetic(old, now, _table(start.get("versions")), versions())


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measure(folder: RunFolder, step: int, places: Places, device: str) -> tuple[float, str]:
    """The loss as training measures it, and the precision that it was computed in."""
    config = folder.config()
    place, length = find_device(device, "device"), stream_length(config)
    stream = open_stream(places.data(config.data), length, config.seed, "val")
    precision = build_precision(config.train.precision, place)
    model = precision.prepare(load_weights(folder.path, step=step, device=place))
    rows = config.train.micro_batch or config.train.batch
    validation = Validation(stream, config.train.eval_tokens, length, rows, config.data.document_mask)
    return validation(model, NextToken(model), precision)[NAME], precision.name
