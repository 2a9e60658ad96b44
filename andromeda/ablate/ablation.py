"""A whole ablation: runs are planned and checked, costs measured, runs queued and resumed, results written.

OUT/VARIANT-sSEED/   one ordinary run folder each, with result.json once it is finished
OUT/costs.json       time and memory of a step of each variant
OUT/results.json     everything, in plain values
OUT/table.md, plot.png, plot.svg
OUT/workers.log      stderr of the worker processes
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from andromeda.ablate.ablation_tables import draw, markdown
from andromeda.ablate.analysis import results
from andromeda.ablate.grid import AblationGrid, check_grid
from andromeda.ablate.jobs import AblationJob, PlannedVariant, jobs_of, plan_variants, refuse_other_runs, with_budget
from andromeda.ablate.worker import RunResult, StepCost, load_result
from andromeda.ablate.worker_pool import WorkerPool, WorkerProcess, environments
from andromeda.bench.record import record, save
from andromeda.train.run_dir import RunDir
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import open_for_writing, read_json_object

_COST = TypeAdapter(StepCost)
OUTPUTS = ("results.json", "table.md", "plot.png", "plot.svg")
"""Files that a call writes; no plot if no variant has an effect."""
OnProgress = Callable[[str, int, int], None]
"""Called after every finished run or measurement: a sentence, number done, total."""


@dataclass(frozen=True)
class AblationSettings:
    """How an ablation is executed."""

    out: Path
    command: str = ""
    jobs: int = 1
    """Processes per device."""
    limit: float = 0.0
    """Seconds after which runs are stopped, to be resumed by another call; 0 is no limit."""
    cost_steps: int = 8
    """Measured steps of each variant; 0 leaves costs out."""
    lean: bool = False
    """Drop the checkpoints of finished runs."""


@dataclass(frozen=True)
class AblationResult:
    """State after a call."""

    results: dict[str, Any]
    finished: int
    total: int
    failures: list[str]
    signal: int


def ablate(source: str, changes: Sequence[str], grid: AblationGrid, settings: AblationSettings, on_progress: OnProgress) -> AblationResult:
    """Train and compare the variants of `grid` on the configuration `source`, resuming what is already in `settings.out`.

    Raises ConfigError, one sentence, before anything runs if a variant is invalid.
    """
    began, out = time.monotonic(), settings.out
    check_grid(grid)
    planned = plan_variants(source, changes, grid)
    if grid.budget != "seconds":
        planned = with_budget(planned, grid, {})
        refuse_other_runs(jobs_of(planned, grid.seeds, out))
    folder = _claim(out)
    try:
        costs = _costs(planned, settings, began, on_progress)
        if grid.budget == "seconds":
            planned = with_budget(planned, grid, {name: cost.step_seconds for name, cost in costs.items()})
        jobs = jobs_of(planned, grid.seeds, out)
        refuse_other_runs(jobs)
        slots = _train(jobs, planned, settings, began, on_progress)
        runs: dict[str, dict[int, RunResult]] = {}
        for job in jobs:
            if (found := load_result(job.folder)) is not None:
                runs.setdefault(job.variant, {})[job.seed] = found
        figures = {"configuration": [source, *changes], **results(planned, runs, costs, grid)}
        _write(out, record(settings.command, figures))
    finally:
        folder.unlock()
    finished = sum(len(of) for of in runs.values())
    return AblationResult(read_json_object(out / "results.json"), finished, len(jobs), slots.failures, slots.slots.stopped)


def _claim(out: Path) -> RunDir:
    """Create the folder and lock it."""
    folder = RunDir(out)
    if folder.exists:
        raise ConfigError(f"{out} is a run folder: give the ablation a folder of its own with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {out} cannot be made ({error.strerror}): give another one with --out.") from None
    folder.lock()
    return folder


@dataclass
class _Trained:
    slots: WorkerPool
    failures: list[str]


def _train(
    jobs: Sequence[AblationJob], planned: Sequence[PlannedVariant], settings: AblationSettings, began: float, on_progress: OnProgress
) -> _Trained:
    """Run every job that is not finished."""
    pending = [job for job in jobs if load_result(job.folder) is None]
    done, failures = len(jobs) - len(pending), list[str]()

    def on_answer(job: AblationJob, answer: dict[str, Any]) -> None:
        nonlocal done
        if "error" in answer:
            failures.append(f"{job.variant}, seed {job.seed}: {answer['error']}")
            on_progress(f"{failures[-1]}", done, len(jobs))
        elif "stopped" in answer:
            on_progress(f"{job.variant}, seed {job.seed}: stopped, to be resumed", done, len(jobs))
        else:
            done += 1
            shown = "diverged" if answer["loss"] is None else f"loss {answer['loss']:.4f}"
            on_progress(f"{job.variant}, seed {job.seed}: {shown} after {answer['seconds']:.1f} s of training", done, len(jobs))

    deadline = began + settings.limit if settings.limit else None
    places = environments(planned[0].config.train.device, settings.jobs)
    slots = WorkerPool(places, settings.out / "workers.log", deadline, settings.lean)
    on_progress(f"{len(jobs)} runs, {len(pending)} remaining, {min(len(places), max(1, len(pending)))} at a time", done, len(jobs))
    if pending:
        slots.run(pending, on_answer)
    return _Trained(slots, failures)


def _costs(planned: Sequence[PlannedVariant], settings: AblationSettings, began: float, on_progress: OnProgress) -> dict[str, StepCost]:
    """Time and memory of each variant, measured one at a time within the time limit, and kept for later calls."""
    path = settings.out / "costs.json"
    marks = {plan.variant.name: _mark(plan) for plan in planned}
    known = {name: of for name, of in _kept_costs(path).items() if of["of"] == marks.get(name)}
    if settings.cost_steps:
        _measure_costs(planned, marks, known, settings, began, on_progress)
    return {name: _step_cost(of) for name, of in known.items()}


def _step_cost(of: dict[str, Any]) -> StepCost:
    """A kept cost. Raises a ValueError where it is of other types."""
    return _COST.validate_python({key: value for key, value in of.items() if key != "of"})


def _kept_costs(path: Path) -> dict[str, dict[str, Any]]:
    """The costs that were measured before. Raises ConfigError if they cannot be read."""
    try:
        kept = read_json_object(path) if path.exists() else {}
        for of in kept.values():
            if not isinstance(of["of"], str) or not _step_cost(of).step_seconds > 0:
                raise ValueError(of)
        return kept
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        raise ConfigError(f"{path} is damaged: remove it, and the costs are measured again.") from None


def _measure_costs(
    planned: Sequence[PlannedVariant],
    marks: dict[str, str],
    known: dict[str, dict[str, Any]],
    settings: AblationSettings,
    began: float,
    on_progress: OnProgress,
) -> None:
    """Measure the missing costs; each is written as soon as it is known."""
    place = environments(planned[0].config.train.device, 1)[0]
    with open_for_writing(settings.out, settings.out / "workers.log", append=True) as log:
        worker = WorkerProcess(place, log)
        for number, plan in enumerate(planned):
            name = plan.variant.name
            if name in known:
                continue
            if settings.limit and time.monotonic() - began > settings.limit:
                on_progress("time limit reached before the other costs were measured", number, len(planned))
                break
            answer = worker.ask({"do": "cost", "config": plan.measured.model_dump(mode="json"), "steps": settings.cost_steps})
            if "CUDA_VISIBLE_DEVICES" not in place:
                worker.close()  # peak resident memory is that of the process, so each variant needs its own
            if "done" not in answer:
                on_progress(f"{name}: its cost was not measured ({answer.get('error', 'stopped')})", number, len(planned))
                continue
            answer.pop("done")
            known[name] = {"of": marks[name], **answer}
            write_whole(settings.out / "costs.json", (json.dumps(known, indent=1) + "\n").encode())
            on_progress(f"{name}: {answer['step_seconds'] * 1e3:.4g} ms/step", number + 1, len(planned))
        worker.close()


def _mark(plan: PlannedVariant) -> str:
    """Identifies the configuration that a cost was measured with."""
    values = plan.measured.model_dump(mode="json")
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _write(out: Path, figures: dict[str, Any]) -> None:
    save(out / "results.json", figures)
    write_whole(out / "table.md", markdown(figures).encode())
    draw(figures, out)
