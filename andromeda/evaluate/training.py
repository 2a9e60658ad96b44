"""The held-out figures that a run wrote down while it trained, beside what its checkpoints give now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.evaluate.comparison import TOLERANCE, Check, Places, difference, same_arithmetic, threads
from andromeda.train import checkpoint
from andromeda.train.callbacks.validation import ROWS
from andromeda.train.manifest import device_name, machine, versions
from andromeda.train.metrics import Metrics, is_number
from andromeda.train.objective import NextToken
from andromeda.train.precision import build_precision
from andromeda.train.run_dir import RunFolder
from andromeda.train.state import find_device
from andromeda.train.trainer import build_validation
from andromeda.train.weights import load_weights
from andromeda.utils.errors import AndromedaError

HELD_OUT, AVERAGE = "validation/", "_average"
NAME = HELD_OUT + "loss"


def training_loss(folder: RunFolder, metrics: Metrics, places: Places, device: str) -> Iterator[Check]:
    """The newest held-out figures in metrics.jsonl whose checkpoint is kept; nothing where there are none."""
    kept = {int(path.name.removeprefix("step-")): path for path in checkpoint.listed(folder.checkpoints)}
    lines = [line for line in metrics.lines if is_number(line.get(NAME)) and line["step"] in kept]
    if lines:
        yield _held_out(folder, lines[-1], kept[lines[-1]["step"]], places, device)


def _held_out(folder: RunFolder, line: dict[str, Any], kept: Path, places: Places, device: str) -> Check:
    what, start = f"held-out loss of step {line['step']}", last_start(folder, line["step"])
    stored = {name: figure for name, figure in line.items() if name.startswith(HELD_OUT)}
    shown = f"{stored[NAME]:.6g}"
    try:
        state = checkpoint.read_values(kept)
        if state.get("validation") != ROWS:
            return Check(what, shown, "not compared", None, 0.0, True, "an older version measured it on other rows")
        with threads(start.get("machine")):
            # How the start computed is known but for its precision, which its configuration decides on equal machines alike.
            exact = repeats_exactly(start, device)
            then = _table(_table(state.get("config")).get("train"))
            average = any(name.endswith(AVERAGE) for name in stored)
            found, precision = _measure(folder, line["step"], then, places, device, average)
    except AndromedaError as error:
        return Check(what, shown, "missing", None, 0.0, False, f"{error}")
    loose = 0.0 if exact else TOLERANCE.get(precision, 5e-2)
    # More may be found than was stored: bytes are counted where a tokenizer came later.
    apart = {name: difference(figure, found.get(name)) for name, figure in stored.items()}
    worst = max(sorted(apart), key=apart.__getitem__)
    note = "equal to the last bit" if apart[worst] == 0 else "" if worst == NAME else f"largest difference at {worst}"
    return Check(what, shown, f"{found[NAME]:.6g}" if found else "nothing held out", apart[worst], loose, apart[worst] <= loose, note)


def last_start(folder: RunFolder, step: int | None = None) -> dict[str, Any]:
    """The newest start of the run that its manifest tells of, or the one that took a step; an empty one where it tells of none."""
    known = [start for start in folder.manifest().get("starts", []) if isinstance(start, dict)]
    before = [start for start in known if step is None or (is_number(start.get("step")) and start["step"] < step)]
    return (before or known or [{}])[-1]


def repeats_exactly(start: dict[str, Any], device: str) -> bool:
    """Whether sums are computed here in the order that a start computed them in."""
    now = {"device": device_name(find_device(device, "device")), **machine()}
    old = {**_table(start.get("machine")), "device": start.get("device")}
    return same_arithmetic(old, now, _table(start.get("versions")), versions())


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measure(
    folder: RunFolder, step: int, then: dict[str, Any], places: Places, device: str, average: bool
) -> tuple[dict[str, float], str]:
    """The held-out figures as training measures them, of the averaged weights too if asked for, and the precision.

    then: the settings of training at that step; a later start may have been given others.
    """
    config, place = folder.config(), find_device(device, "device")
    train = config.train.model_copy(
        update={key: then[key] for key in ("eval_tokens", "micro_batch_size") if isinstance(then.get(key), int)}
    )
    validation = build_validation(config.model_copy(update={"train": train, "data": places.data(config.data)}))
    precision = build_precision(train.precision, place)

    def figures(average: bool) -> dict[str, float]:
        model = precision.prepare(load_weights(folder.path, step=step, average=average, device=place))
        return validation(model, NextToken(model), precision)

    averaged = {f"{name}{AVERAGE}": figure for name, figure in figures(True).items()} if average else {}
    return figures(False) | averaged, precision.name
