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

from andromeda.config.own_code import FLAG, CodeNotAllowed, code_allowed
from andromeda.evaluate.comparison import (
    FRACTION_TOLERANCE,
    TOLERANCE,
    DataLocations,
    VerificationCheck,
    relative_difference,
    same_arithmetic,
    use_threads,
)
from andromeda.evaluate.evaluator import EVALUATIONS, PlannedEvaluation, run_evaluation
from andromeda.evaluate.loaded_model import LoadedModel, load_model
from andromeda.evaluate.result import EvalResult, load_results, to_json_values
from andromeda.evaluate.run_files import check_held_out_loss, check_run_files
from andromeda.evaluate.stored_limits import excess
from andromeda.train.metrics import read_metrics
from andromeda.train.run_dir import RunDir
from andromeda.utils.errors import AndromedaError
from andromeda.utils.progress_callback import ProgressCallback


def verify(run: Path, locations: DataLocations, device: str, report: ProgressCallback) -> Iterator[VerificationCheck]:
    """All checks of a run folder, as they are made. Raises CheckpointError where there is nothing to check."""
    folder = RunDir(run)
    metrics = read_metrics(folder.metrics_file)
    yield from check_run_files(folder, metrics, locations)
    yield from check_held_out_loss(folder, metrics, locations, device)
    for stored in load_results(run).values():
        yield from _result(run, stored, locations, device, report)


def _result(run: Path, stored: EvalResult, locations: DataLocations, device: str, report: ProgressCallback) -> Iterator[VerificationCheck]:
    """Weights, data and figures of one result."""
    settings = _moved(dict(stored.settings), locations)
    if stored.kind == "harness" and settings.get("include") and not code_allowed():
        reason = f"its tasks are of the folder {settings['include']!r}, which may hold code: if you trust it, add {FLAG}"
        yield VerificationCheck.not_checked(stored.name, "", reason)
        return
    average = bool(settings.pop("average", False))
    try:
        loaded = load_model(run, step=stored.step, average=average, device=device, dtype=str(stored.machine.get("precision", "auto")))
        planned = PlannedEvaluation(EVALUATIONS[stored.kind], EVALUATIONS[stored.kind].read(settings))
        if too_much := excess(planned.settings, loaded.context):
            yield VerificationCheck.not_checked(stored.name, "", f"{too_much}: measure again with smaller settings")
            return
        with use_threads(stored.machine):
            found = run_evaluation(loaded, planned, report)
    except CodeNotAllowed as error:
        yield VerificationCheck.not_checked(stored.name, "", str(error))
        return
    except AndromedaError as error:
        yield VerificationCheck(stored.name, "", "", None, 0.0, False, f"cannot be repeated: {error}")
        return
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # settings of other types than ours
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield VerificationCheck(stored.name, "", "", None, 0.0, False, f"cannot be repeated: its settings are not valid ({reason})")
        return
    yield VerificationCheck(f"{stored.name}: weights", stored.weights[:12], found.weights[:12], None, 0.0, found.weights == stored.weights)
    if stored.data or found.data:
        yield VerificationCheck(f"{stored.name}: data", str(stored.data)[:12], str(found.data)[:12], None, 0.0, found.data == stored.data)
    yield _figures(stored, found, loaded)


def _figures(stored: EvalResult, found: EvalResult, loaded: LoadedModel) -> VerificationCheck:
    old, new = dict(leaves(stored.result)), dict(leaves(to_json_values(found.result)))
    exact = same_arithmetic(stored.machine, found.machine, stored.versions, found.versions)
    loose, share = (0.0, 0.0) if exact else (TOLERANCE[loaded.precision], FRACTION_TOLERANCE[loaded.precision])
    if old.keys() != new.keys():
        return VerificationCheck(
            f"{stored.name}: figures", f"{len(old)} figures", f"{len(new)} figures", None, loose, False, "not the same figures"
        )
    apart = {key: relative_difference(old[key], new[key]) for key in old}
    agrees = all(gap <= loose or _near(old[key], new[key], share) for key, gap in apart.items())
    worst = max(apart, key=apart.__getitem__, default="")
    gap = apart[worst] if worst else 0.0
    shown = worst if worst and gap else next((key for key, value in old.items() if isinstance(value, float) and not _is_axis(key)), "")
    note = "equal to the last bit" if gap == 0 else f"largest difference at {worst}" + _other_code(stored, found)
    return VerificationCheck(f"{stored.name}: {shown}", _spell(old.get(shown)), _spell(new.get(shown)), gap, loose, agrees, note)


def _other_code(stored: EvalResult, found: EvalResult) -> str:
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


def _moved(settings: dict[str, Any], locations: DataLocations) -> dict[str, Any]:
    """Settings with the paths of files that lie elsewhere now."""
    if locations.corpus and settings.get("corpus") is not None and not settings.get("text"):
        settings["corpus"] = locations.corpus
    for key in ("text", "file", "include"):
        if settings.get(key) and locations.files and not Path(settings[key]).exists():
            settings[key] = str(Path(locations.files) / Path(settings[key]).name)
    return settings


def as_json(check: VerificationCheck) -> str:
    """A check as one line."""
    return json.dumps(to_json_values(check._asdict()))
