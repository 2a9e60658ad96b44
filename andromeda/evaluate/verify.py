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

from andromeda.evaluate.comparison import SHARES, TOLERANCE, Check, Places, difference, same_arithmetic, threads
from andromeda.evaluate.loaded_model import Subject, open_subject
from andromeda.evaluate.result import Result, plain, results
from andromeda.evaluate.run import EVALUATIONS, Request, evaluate
from andromeda.evaluate.run_files import records
from andromeda.evaluate.training import training_loss
from andromeda.train.metrics import read_metrics
from andromeda.train.run_dir import RunFolder
from andromeda.utils.errors import AndromedaError
from andromeda.utils.progress_callback import ProgressCallback


def verify(run: Path, places: Places, device: str, report: ProgressCallback) -> Iterator[Check]:
    """All checks of a run folder, as they are made. Raises CheckpointError where there is nothing to check."""
    folder = RunFolder(run)
    metrics = read_metrics(folder.metrics_file)
    yield from records(folder, metrics, places)
    yield from training_loss(folder, metrics, places, device)
    for stored in results(run).values():
        yield from _result(run, stored, places, device, report)


def _result(run: Path, stored: Result, places: Places, device: str, report: ProgressCallback) -> Iterator[Check]:
    """Weights, data and figures of one result."""
    settings = _moved(dict(stored.settings), places)
    average = bool(settings.pop("average", False))
    try:
        subject = open_subject(run, step=stored.step, average=average, device=device, dtype=str(stored.machine.get("precision", "auto")))
        evaluation = EVALUATIONS[stored.kind]
        with threads(stored.machine):
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
    agrees = all(gap <= loose or _near(old[key], new[key], share) for key, gap in apart.items())
    worst = max(apart, key=apart.__getitem__, default="")
    gap = apart[worst] if worst else 0.0
    shown = worst if worst and gap else next((key for key, value in old.items() if isinstance(value, float) and not _is_axis(key)), "")
    note = "equal to the last bit" if gap == 0 else f"largest difference at {worst}" + _other_code(stored, found)
    return Check(f"{stored.name}: {shown}", _spell(old.get(shown)), _spell(new.get(shown)), gap, loose, agrees, note)


def _other_code(stored: Result, found: Result) -> str:
    """That the program itself is another one now, where that is known."""
    old, new = (one.versions.get("code") for one in (stored, found))
    commits = [str(code["commit"]) if isinstance(code, dict) and code.get("commit") else "" for code in (old, new)]
    return f"; made by the code of {commits[0][:9]}" if commits[0] and commits[0] != commits[1] else ""


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


def _near(old: Any, new: Any, share: float) -> bool:
    """Whether two figures are shares that lie so close together."""
    return all(isinstance(one, float) and 0.0 <= one <= 1.0 for one in (old, new)) and bool(abs(old - new) <= share)


def _is_axis(path: str) -> bool:
    """Whether a figure says where something was measured, not what was found."""
    return path.partition("[")[0] in ("depths", "chance")


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


def as_json(check: Check) -> str:
    """A check as one line."""
    return json.dumps(plain(check._asdict()))
