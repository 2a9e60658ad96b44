"""The held-out loss that a run wrote down while it trained, computed again from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.data.loader import open_stream
from andromeda.errors import AndromedaError
from andromeda.evaluate.check import TOLERANCE, Check, Places, difference, same_arithmetic
from andromeda.train import checkpoint
from andromeda.train.device import find_device
from andromeda.train.folder import RunFolder
from andromeda.train.manifest import device_name, machine, versions
from andromeda.train.objective import NextToken
from andromeda.train.precision import build_precision
from andromeda.train.run import stream_length
from andromeda.train.validation import Validation
from andromeda.train.weights import load_weights

NAME = "validation/loss"


def training_loss(run: Path, places: Places, device: str) -> Iterator[Check]:
    """The newest one in metrics.jsonl whose checkpoint is kept; nothing where there is none."""
    folder = RunFolder(run)
    kept = {int(path.name.removeprefix("step-")) for path in checkpoint.listed(folder.checkpoints)}
    lines = [line for line in _lines(folder.metrics_file) if NAME in line and line["step"] in kept]
    if not lines:
        return
    what, stored = f"held-out loss of step {lines[-1]['step']}", float(lines[-1][NAME])
    try:
        found, precision = _measure(folder, lines[-1]["step"], places, device)
    except AndromedaError as error:
        yield Check(what, f"{stored:.6g}", "missing", None, 0.0, False, f"{error}")
        return
    start: dict[str, Any] = (folder.manifest().get("starts") or [{}])[-1]
    # How the start computed is known but for its precision, which its configuration decides on equal machines alike.
    now = {"device": device_name(find_device(device, "device")), **machine()}
    old = {"device": start.get("device"), **start.get("machine", {})}
    loose = 0.0 if same_arithmetic(old, now, start.get("versions", {}), versions()) else TOLERANCE.get(precision, 5e-2)
    gap = difference(stored, found)
    yield Check(what, f"{stored:.6g}", f"{found:.6g}", gap, loose, gap <= loose, "equal to the last bit" if gap == 0 else "")


def _measure(folder: RunFolder, step: int, places: Places, device: str) -> tuple[float, str]:
    """The loss as training measures it, and the precision that it was computed in."""
    config = folder.config()
    place, length = find_device(device, "device"), stream_length(config)
    data = config.data.model_copy(update={"corpus": places.corpus, "sources": ()}) if places.corpus else config.data
    stream = open_stream(data, length, config.seed, "val")
    precision = build_precision(config.train.precision, place)
    model = precision.prepare(load_weights(folder.path, step=step, device=place))
    rows = config.train.micro_batch or config.train.batch
    validation = Validation(stream, config.train.eval_tokens, length, rows, config.data.document_mask)
    return validation(model, NextToken(model), precision)[NAME], precision.name


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return []
