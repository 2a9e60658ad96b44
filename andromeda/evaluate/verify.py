"""Are the figures of a run folder true? Everything that it says of itself is computed again and compared.

On a CPU of the same kind, with the same threads, precision and PyTorch, sums run in the same order: there a figure must be
equal to the last bit. Elsewhere the rounding differs, and with it figures in their last digits: then the tolerance of the
precision holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from andromeda.data.loader import open_stream
from andromeda.data.read import Report
from andromeda.errors import AndromedaError
from andromeda.evaluate.check import SHARES, TOLERANCE, Check, Places, difference, same_arithmetic
from andromeda.evaluate.result import Result, plain, results
from andromeda.evaluate.run import EVALUATIONS, Request, evaluate
from andromeda.evaluate.subject import Subject, open_subject
from andromeda.evaluate.training import training_loss
from andromeda.train.folder import RunFolder
from andromeda.train.run import stream_length


def verify(run: Path, places: Places, device: str, report: Report) -> Iterator[Check]:
    """All checks of a run folder, as they are made. Raises CheckpointError where there is nothing to check."""
    yield _corpus(run, places)
    yield from training_loss(run, places, device)
    for stored in results(run).values():
        yield from _result(run, stored, places, device, report)


def _corpus(run: Path, places: Places) -> Check:
    """The fingerprint of the training stream that the manifest names."""
    folder = RunFolder(run)
    stored, config = str(folder.manifest().get("data", "")), folder.config()
    if not stored:
        return Check("training data", "none named", "", None, 0.0, True, "the run has no manifest of its training")
    data = config.data.model_copy(update={"corpus": places.corpus, "sources": ()}) if places.corpus else config.data
    try:
        found = open_stream(data, stream_length(config), config.seed).fingerprint
    except AndromedaError as error:
        return Check("training data", stored[:12], "missing", None, 0.0, False, f"{error}")
    return Check("training data", stored[:12], found[:12], None, 0.0, found == stored)


def _result(run: Path, stored: Result, places: Places, device: str, report: Report) -> Iterator[Check]:
    """Weights, data and figures of one result."""
    settings = _moved(dict(stored.settings), places)
    average = bool(settings.pop("average", False))
    try:
        subject = open_subject(run, step=stored.step, average=average, device=device, dtype=str(stored.machine.get("precision", "auto")))
        evaluation = EVALUATIONS[stored.kind]
        found = evaluate(subject, Request(evaluation, evaluation.read(settings)), report)
    except AndromedaError as error:
        yield Check(stored.name, "", "", None, 0.0, False, f"cannot be repeated: {error}")
        return
    yield Check(f"{stored.name}: weights", stored.weights[:12], found.weights[:12], None, 0.0, found.weights == stored.weights)
    if stored.data or found.data:
        yield Check(f"{stored.name}: data", str(stored.data)[:12], str(found.data)[:12], None, 0.0, found.data == stored.data)
    yield _figures(stored, found, subject)


def _figures(stored: Result, found: Result, subject: Subject) -> Check:
    old, new = dict(leaves(stored.result)), dict(leaves(plain(found.result)))
    exact = same_arithmetic(stored.machine, found.machine, stored.versions, found.versions)
    loose, share = (0.0, 0.0) if exact else (TOLERANCE[subject.precision], SHARES[subject.precision])
    if old.keys() != new.keys():
        return Check(f"{stored.name}: figures", f"{len(old)} figures", f"{len(new)} figures", None, loose, False, "not the same figures")
    apart = {key: difference(old[key], new[key]) for key in old}
    agrees = all(gap <= loose or (_is_share(old[key]) and abs(old[key] - new[key]) <= share) for key, gap in apart.items())
    worst = max(apart, key=apart.__getitem__, default="")
    gap = apart[worst] if worst else 0.0
    shown = worst if worst and gap else next((key for key, value in old.items() if isinstance(value, float)), "")
    note = "equal to the last bit" if gap == 0 else f"largest difference at {worst}" + _other_code(stored, found)
    return Check(f"{stored.name}: {shown}", _spell(old.get(shown)), _spell(new.get(shown)), gap, loose, agrees, note)


def _other_code(stored: Result, found: Result) -> str:
    """That the program itself is another one now, where that is known."""
    old, new = stored.versions.get("code") or {}, found.versions.get("code") or {}
    return f"; made by the code of {old['commit'][:9]}" if old.get("commit") and old.get("commit") != new.get("commit") else ""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure or word of nested values, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0.0 <= value <= 1.0


def _spell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _moved(settings: dict[str, Any], places: Places) -> dict[str, Any]:
    """Settings with the paths of files that lie elsewhere now."""
    if places.corpus and settings.get("corpus") is not None and not settings.get("text"):
        settings["corpus"] = places.corpus
    for key in ("text", "file", "include"):
        if settings.get(key) and places.files and not Path(settings[key]).exists():
            settings[key] = str(Path(places.files) / Path(settings[key]).name)
    return settings


def repeat(run: Path, place: Path, places: Places, report: Report) -> Check:
    """Train the run again in the folder `place` and compare the last weights bit for bit. Only a CPU repeats a run exactly."""
    import torch

    from andromeda.train.run import train
    from andromeda.train.weights import read_weights

    config = RunFolder(run).config()
    update: dict[str, Any] = {"train": config.train.model_copy(update={"device": "cpu"})}
    if places.corpus:
        update["data"] = config.data.model_copy(update={"corpus": places.corpus, "sources": ()})
    report("training again", 0, 1)
    train(config.model_copy(update=update), place)
    report("training again", 1, 1)
    old, new = read_weights(run)[1], read_weights(place)[1]
    names = sorted(old.keys() | new.keys())
    different = [name for name in names if name not in old or name not in new or not torch.equal(old[name], new[name])]
    note = f"{len(different)} of {len(old)} tensors differ, the first is {different[0]}" if different else "equal to the last bit"
    return Check("weights of a repeated training", f"{len(old)} tensors", f"{len(new)} tensors", None, 0.0, not different, note)


def as_json(check: Check) -> str:
    """A check as one line."""
    return json.dumps(plain(check._asdict()))
