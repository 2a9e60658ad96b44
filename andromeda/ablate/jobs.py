"""Every run that a grid stands for, each with its whole configuration, checked before the first one begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from andromeda.ablate.budget import amount_of, flops_per_token, steps_for, with_steps
from andromeda.ablate.grid import BASELINE, Arm, Grid, slug
from andromeda.config.keys import flatten
from andromeda.config.load import load
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.model.meta_model import meta_model
from andromeda.plan.parameters import count
from andromeda.train.run_dir import RunFolder
from andromeda.train.state import find_device
from andromeda.train.trainer import open_data
from andromeda.utils.errors import AndromedaError, ConfigError

PLACES = ("data.corpus", "data.workers", "train.device")
"""Keys that may differ between a kept run and its job: the data's fingerprint is compared instead of its path."""


@dataclass(frozen=True)
class Planned:
    """An arm with its configuration (of the first seed)."""

    arm: Arm
    config: RunConfig
    parameters: int
    flops: float
    """Training FLOPs per token."""
    measured: RunConfig
    """What its cost is measured on."""


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    seed: int
    folder: Path
    config: RunConfig


def plan_arms(source: str, changes: Sequence[str], grid: Grid) -> list[Planned]:
    """The baseline and every arm of the grid, as configured. Raises ConfigError naming the arm that is refused."""
    base = [*grid.base, *changes]
    chains: dict[str, list[str]] = {}
    planned: list[Planned] = []
    for arm in (Arm(name=BASELINE, on=""), *grid.arm):
        chains[arm.name] = [*chains.get(arm.on, []), *arm.changes]
        planned.append(_planned(source, [*base, *chains[arm.name], f"seed={grid.seeds[0]}"], arm, grid.cost))
    _refuse_twins(planned)
    return planned


def _planned(source: str, changes: Sequence[str], arm: Arm, cost: Sequence[str]) -> Planned:
    try:
        config = load(source, changes)
        if not config.train.eval_every:
            # Without it nothing would be held out, and there would be nothing to compare.
            config = load(source, [*changes, f"train.eval_every={config.train.steps}"])
        check_training(config)
        find_device(config.train.device)
        open_data(config)
        measured = load(source, [*changes, *cost])
        return Planned(arm, config, count(meta_model(config.model)).total, flops_per_token(config), measured)
    except AndromedaError as error:
        where = "The baseline" if arm.name == BASELINE else f"Arm {arm.name!r}"
        raise ConfigError(f"{where} is refused: {error}") from None


def _refuse_twins(planned: Sequence[Planned]) -> None:
    """Two arms with one configuration would be compared with themselves."""
    seen: dict[tuple[RunConfig, float], str] = {}
    for plan in planned:
        key = plan.config, plan.arm.share
        if key in seen:
            raise ConfigError(f"Arm {plan.arm.name!r} is the same run as {seen[key]!r}: its changes change nothing, so leave it out.")
        seen[key] = plan.arm.name


def with_budget(planned: Sequence[Planned], grid: Grid, step_seconds: Mapping[str, float]) -> list[Planned]:
    """Every arm with the steps that its share of the budget pays for. step_seconds: by arm, for a budget of seconds."""
    amount = grid.amount or amount_of(grid.budget, planned[0].config)
    return [_paid(plan, grid.budget, amount, step_seconds.get(plan.arm.name)) for plan in planned]


def _paid(plan: Planned, kind: str, amount: float, seconds: float | None) -> Planned:
    try:
        config = with_steps(plan.config, steps_for(kind, amount * plan.arm.share, plan.config, seconds))
    except AndromedaError as error:
        raise ConfigError(f"Arm {plan.arm.name!r} is refused: {error}") from None
    return replace(plan, config=config)


def jobs_of(planned: Sequence[Planned], seeds: Sequence[int], out: Path) -> list[Job]:
    """All runs, arm by arm in the grid's order: a study that is cut off has whole rows for its first arms, not one seed of each."""
    return [_job(plan, seed, out) for plan in planned if plan.arm.train for seed in seeds]


def _job(plan: Planned, seed: int, out: Path) -> Job:
    config = plan.config.model_copy(update={"seed": seed, "name": f"{plan.arm.name}, seed {seed}"})
    return Job(plan.arm.name, seed, out / f"{slug(plan.arm.name)}-s{seed}", config)


def refuse_other_runs(jobs: Sequence[Job]) -> None:
    """Raises ConfigError when a run folder already holds another run than the job's, or one of other data."""
    for job in jobs:
        folder = RunFolder(job.folder)
        if not folder.exists:
            continue
        old, new = flatten(folder.config().model_dump()), flatten(job.config.model_dump())
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not key.startswith(PLACES))
        if differing:
            told = f"{differing[0]} was {old.get(differing[0])!r} and is now {new.get(differing[0])!r}"
            raise ConfigError(f"{job.folder} holds another run ({told}): give the old values, or another --out.")
        before, now = folder.manifest().get("data"), open_data(job.config)[0].fingerprint
        if before not in (None, now):
            raise ConfigError(
                f"{job.folder} was trained on other data (fingerprint {before[:12]}, now {now[:12]}): "
                "bring the old corpus back, or give another --out."
            )
