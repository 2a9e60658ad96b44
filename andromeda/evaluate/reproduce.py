"""A training done again from its configuration alone: the strongest proof of a run, and its price is the run's.

On the processor, threads and PyTorch of the run every weight and every figure must be equal to the last bit. On others the
order of sums differs, and training magnifies that: then only the last losses are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from andromeda.evaluate.comparison import DataLocations, VerificationCheck, relative_difference, use_threads
from andromeda.evaluate.run_files import last_start, repeats_exactly
from andromeda.train.metrics import TIMING_METRICS, MetricsHistory, read_metrics
from andromeda.train.progress import MetricValues, NullReporter
from andromeda.train.resume import LENGTH
from andromeda.train.run_dir import RunDir
from andromeda.train.trainer import train
from andromeda.train.weights import read_weights
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback

LOOSE = 0.02
"""Relative difference of the last losses of two trainings that differ by rounding. Another seed, of a small run, differs by as much."""


class StepProgress(NullReporter):
    """Reports the steps of a training."""

    def __init__(self, steps: int, report: ProgressCallback) -> None:
        self._steps, self._report = steps, report

    def log(self, step: int, figures: MetricValues) -> None:
        """One more."""
        self._report("training again", step, self._steps)


def retrain_and_compare(run: Path, place: Path, locations: DataLocations, report: ProgressCallback) -> Iterator[VerificationCheck]:
    """Train the run again on the CPU, in the new folder `place`, and compare. Raises RequestError for a run that cannot be repeated."""
    folder = RunDir(run)
    config, start, old = folder.config(), last_start(folder), read_metrics(folder.metrics_file)
    manifest = folder.manifest()
    if (run / "extension.json").exists() or manifest.get("parent"):
        raise RequestError(f"{run} began with the weights of another run, which its configuration does not give: repeat that one.")
    if any(set(LENGTH) & set(begun.get("changes", [])) for begun in manifest.get("starts", [])):
        raise RequestError(
            f"{run} was given another length when it was resumed, which its configuration does not record: it cannot be repeated."
        )
    if old.step < config.train.steps:
        raise RequestError(f"{run} stands at step {old.step} of {config.train.steps}: finish it before it is repeated.")
    update = {"train": config.train.model_copy(update={"device": "cpu"}), "data": locations.data(config.data)}
    with use_threads(start.get("machine")):
        exact = repeats_exactly(start, "cpu")
        train(config.model_copy(update=update), place, reporter=StepProgress(config.train.steps, report))
    new = read_metrics(RunDir(place).metrics_file)
    if exact:
        yield from (_weights(run, place), _metrics(old, new))
    else:
        yield _last_loss(old, new)


def _weights(run: Path, place: Path) -> VerificationCheck:
    old, new = read_weights(run)[1], read_weights(place)[1]
    names = sorted(old.keys() | new.keys())
    different = [name for name in names if name not in old or name not in new or not torch.equal(old[name], new[name])]
    note = f"{len(different)} of {len(old)} tensors differ, the first is {different[0]}" if different else "equal to the last bit"
    return VerificationCheck("weights of a repeated training", f"{len(old)} tensors", f"{len(new)} tensors", None, 0.0, not different, note)


def _metrics(old: MetricsHistory, new: MetricsHistory) -> VerificationCheck:
    """All figures of metrics.jsonl but those of the machine's speed."""
    pairs = list(zip(old.records, new.records, strict=False))
    wrong = next((difference for one, other in pairs if (difference := _apart(one, other))), "")
    same = not wrong and len(old.records) == len(new.records)
    note = "equal to the last bit" if same else wrong or "not the same lines"
    return VerificationCheck(
        "metrics of a repeated training", f"{len(old.records)} lines", f"{len(new.records)} lines", None, 0.0, same, note
    )


def _apart(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first figure that differs, in words."""
    for name in sorted((old.keys() | new.keys()) - set(TIMING_METRICS)):
        if old.get(name) != new.get(name):
            return f"{name} of step {old['step']} was {old.get(name)} and is {new.get(name)}"
    return ""


def _last_loss(old: MetricsHistory, new: MetricsHistory) -> VerificationCheck:
    name = "validation/loss" if old.latest("validation/loss") is not None else "loss"
    stored, found = old.latest(name), new.latest(name)
    gap = relative_difference(stored, found)
    note = "another processor, device or PyTorch: its bits cannot be repeated here"
    return VerificationCheck(f"{name} of a repeated training", f"{stored:.6g}", f"{found:.6g}", gap, LOOSE, gap <= LOOSE, note)
