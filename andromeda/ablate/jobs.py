"""Every run of a grid with its whole configuration, checked before the first one begins.

All variants get an equal budget of tokens, FLOPs or seconds, converted to steps; the schedule is scaled to those steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from andromeda.ablate.grid import BASELINE, AblationGrid, Variant, slug
from andromeda.config.keys import flatten
from andromeda.config.load import from_values, load
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.model.meta_model import shared_meta_model
from andromeda.optim.schedules import build_window_warmup
from andromeda.plan.estimate import count_parameters
from andromeda.train.run_dir import RunDir, refuse_linked_folder
from andromeda.train.state import resolve_device
from andromeda.train.trainer import open_streams
from andromeda.utils.errors import AndromedaError, ConfigError

SAMPLES = 64
"""Points of a run at which a growing window is sampled."""


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step."""
    return config.train.batch_size * (config.train.seq_len or config.model.max_seq_len)


def flops_per_token(config: RunConfig) -> float:
    """Model FLOPs of training per token, averaged over the run if the window grows."""
    sequence, train = config.train.seq_len or config.model.max_seq_len, config.train
    if not train.window.end:
        return training_flops_per_token(config.model, sequence)
    window = build_window_warmup(train.window, SAMPLES)
    return statistics.fmean(training_flops_per_token(config.model, sequence, window=window(at)) for at in range(SAMPLES))


def amount_of(kind: str, config: RunConfig) -> float:
    """Tokens or FLOPs of a whole run of this configuration."""
    tokens = float(config.train.steps * tokens_per_step(config))
    return tokens * flops_per_token(config) if kind == "flops" else tokens


def spent(kind: str, config: RunConfig, seconds_per_step: float | None = None) -> float | None:
    """Tokens, FLOPs or seconds of a run of `config`; None for seconds if the time of a step was not measured."""
    if kind == "seconds":
        return config.train.steps * seconds_per_step if seconds_per_step else None
    return amount_of(kind, config)


def steps_for(kind: str, amount: float, config: RunConfig, seconds_per_step: float | None = None) -> int:
    """Steps of `config` closest to `amount` tokens, FLOPs or seconds. Raises ConfigError for less than one step."""
    if kind == "seconds":
        if not seconds_per_step:
            raise ConfigError("A budget of seconds needs the time of a step: measure it with --timing-steps above 0.")
        each = seconds_per_step
    else:
        each = tokens_per_step(config) * (flops_per_token(config) if kind == "flops" else 1.0)
    steps = round(amount / each)
    if steps < 1:
        raise ConfigError(f"The budget of {amount:.4g} {kind} is less than one step of {config.name!r}, which takes {each:.4g}: raise it.")
    return steps


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The configuration with this many steps; warm-ups and cooldown keep their share of the run."""
    ratio = steps / config.train.steps
    values = config.model_dump()
    train = values["train"]
    train["steps"] = steps
    schedule, optim = train["schedule"], train["optim"]
    schedule["warmup"] = round(schedule["warmup"] * ratio)
    schedule["cooldown"] = min(round(schedule["cooldown"] * ratio), steps - schedule["warmup"])
    optim["momentum_warmup"] = round(optim["momentum_warmup"] * ratio)
    return from_values(values)


LOCAL_KEYS = ("data.corpus", "data.workers", "train.device")
"""Keys that may differ between an existing run and its job: the data's fingerprint is compared instead of its path."""


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with its configuration (of the first seed)."""

    variant: Variant
    config: RunConfig
    parameters: int
    flops: float
    """Training FLOPs per token."""
    measured: RunConfig
    """The configuration under which its cost is measured."""


@dataclass(frozen=True)
class AblationJob:
    """One run."""

    variant: str
    seed: int
    folder: Path
    config: RunConfig


def plan_variants(source: str, changes: Sequence[str], grid: AblationGrid) -> list[PlannedVariant]:
    """The baseline and every variant of the grid, resolved. Raises ConfigError, which names the variant that is refused."""
    base = [*grid.base, *changes]
    chains: dict[str, list[str]] = {}
    planned: list[PlannedVariant] = []
    for variant in (Variant(name=BASELINE, compared_with=""), *grid.variant):
        chains[variant.name] = [*chains.get(variant.compared_with, []), *variant.changes]
        planned.append(_planned(source, [*base, *chains[variant.name], f"seed={grid.seeds[0]}"], variant, grid.cost))
    _refuse_twins(planned)
    return planned


def _planned(source: str, changes: Sequence[str], variant: Variant, cost: Sequence[str]) -> PlannedVariant:
    try:
        config = load(source, changes)
        if not config.train.eval_every:
            # Without validation there would be no held-out loss to compare.
            config = load(source, [*changes, f"train.eval_every={config.train.steps}"])
        check_training(config)
        resolve_device(config.train.device)
        open_streams(config)
        measured = load(source, [*changes, *cost])
        return PlannedVariant(variant, config, count_parameters(shared_meta_model(config.model)).total, flops_per_token(config), measured)
    except AndromedaError as error:
        where = "The baseline" if variant.name == BASELINE else f"Variant {variant.name!r}"
        raise ConfigError(f"{where} is refused: {error}") from None


def _refuse_twins(planned: Sequence[PlannedVariant]) -> None:
    """Two variants with the same configuration would be the same run."""
    seen: dict[tuple[RunConfig, float], str] = {}
    for plan in planned:
        key = plan.config, plan.variant.budget_share
        if key in seen:
            raise ConfigError(
                f"Variant {plan.variant.name!r} is the same run as {seen[key]!r}: its changes have no effect, so leave it out."
            )
        seen[key] = plan.variant.name


def with_budget(planned: Sequence[PlannedVariant], grid: AblationGrid, step_seconds: Mapping[str, float]) -> list[PlannedVariant]:
    """Every variant with the steps that its share of the budget pays for. step_seconds: by variant, for a budget of seconds."""
    amount = grid.amount or amount_of(grid.budget, planned[0].config)
    return [_paid(plan, grid.budget, amount, step_seconds.get(plan.variant.name)) for plan in planned]


def _paid(plan: PlannedVariant, kind: str, amount: float, seconds: float | None) -> PlannedVariant:
    try:
        config = with_steps(plan.config, steps_for(kind, amount * plan.variant.budget_share, plan.config, seconds))
    except AndromedaError as error:
        raise ConfigError(f"Variant {plan.variant.name!r} is refused: {error}") from None
    return replace(plan, config=config)


def jobs_of(planned: Sequence[PlannedVariant], seeds: Sequence[int], out: Path) -> list[AblationJob]:
    """All runs in the order of the grid, each variant with all its seeds: after an interruption the first variants are complete."""
    return [_job(plan, seed, out) for plan in planned if plan.variant.train for seed in seeds]


def _job(plan: PlannedVariant, seed: int, out: Path) -> AblationJob:
    config = plan.config.model_copy(update={"seed": seed, "name": f"{plan.variant.name}, seed {seed}"})
    return AblationJob(plan.variant.name, seed, out / f"{slug(plan.variant.name)}-s{seed}", config)


def refuse_other_runs(jobs: Sequence[AblationJob]) -> None:
    """Raises ConfigError if a run folder already holds a different run, or one that was trained on other data."""
    for job in jobs:
        refuse_linked_folder(job.folder.parent, job.folder)
        folder = RunDir(job.folder)
        if not folder.exists:
            continue
        old, new = flatten(folder.config().model_dump()), flatten(job.config.model_dump())
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not key.startswith(LOCAL_KEYS))
        if differing:
            difference = f"{differing[0]} was {old.get(differing[0])!r} and is now {new.get(differing[0])!r}"
            raise ConfigError(f"{job.folder} holds another run ({difference}): use the old values, or another --out.")
        before, now = folder.manifest().get("data"), open_streams(job.config)[0].fingerprint
        if before not in (None, now):
            raise ConfigError(
                f"{job.folder} was trained on other data (fingerprint {before[:12]}, now {now[:12]}): "
                "restore the old corpus, or give another --out."
            )
