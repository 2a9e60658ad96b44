"""From the results of all runs to the effect, significance and verdict of each variant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from andromeda.ablate.grid import BASELINE, AblationGrid
from andromeda.ablate.jobs import PlannedVariant, spent
from andromeda.ablate.statistics import Effect, Losses, VariancePrior, effect, holm, shared_prior, verdict
from andromeda.ablate.worker import RunResult, StepCost

Runs = Mapping[str, Mapping[int, RunResult]]
"""Finished runs by variant and seed."""


@dataclass(frozen=True)
class VariantComparison:
    """One variant against what it is compared with."""

    effect: Effect | None
    corrected: float | None
    """p-value corrected for the number of variants."""
    verdict: str


def compare(planned: Sequence[PlannedVariant], runs: Runs, grid: AblationGrid) -> dict[str, VariantComparison]:
    """Each variant but the baseline. Variants that were not trained have no effect."""
    variants = [plan.variant for plan in planned if plan.variant.name != BASELINE and plan.variant.train]
    finite = {name: figures(of, grid.metric) for name, of in runs.items()}
    pairs = {variant.name: (finite.get(variant.name, {}), finite.get(variant.compared_with, {})) for variant in variants}
    plain = {name: effect(*pair) for name, pair in pairs.items() if all(pair)}
    prior = _prior(plain, grid)
    found = {name: effect(*pairs[name], prior) for name in plain}
    lost = {variant.name: _divergence(runs, variant.name, variant.compared_with) for variant in variants}
    claims = [name for name in found if not lost[name]]
    corrected = dict(zip(claims, holm([found[name].p for name in claims]), strict=True))
    return {variant.name: _compared(found.get(variant.name), corrected.get(variant.name), lost[variant.name]) for variant in variants}


def _compared(found: Effect | None, corrected: float | None, lost: str) -> VariantComparison:
    if lost:
        return VariantComparison(None, None, lost)
    return VariantComparison(found, corrected, verdict(found, corrected)) if found else VariantComparison(None, None, "not run")


def _divergence(runs: Runs, name: str, on: str) -> str:
    """The verdict if runs did not end with a finite loss, else empty. Such runs are not averaged."""
    variant, base = runs.get(name, {}), runs.get(on, {})
    if fallen := sum(run.diverged for run in base.values()):
        return f"no verdict: {fallen} of {len(base)} runs of {on!r} diverged"
    fallen = sum(run.diverged for run in variant.values())
    return f"diverges: {fallen} of {len(variant)} runs" if fallen else ""


def _prior(plain: Mapping[str, Effect], grid: AblationGrid) -> VariancePrior | None:
    if grid.variance == "own":
        return None
    seeds = max((found.seeds for found in plain.values()), default=0)
    spreads = [found.spread for found in plain.values() if found.paired and found.seeds == seeds and found.spread is not None]
    return shared_prior([spread**2 for spread in spreads], seeds - 1) if seeds > 1 else None


def figures(of: Mapping[int, RunResult], metric: str) -> Losses:
    """The finite final metrics of a variant by seed."""
    every = {seed: getattr(run, metric) for seed, run in of.items()}
    return {seed: figure for seed, figure in every.items() if figure is not None}


def results(planned: Sequence[PlannedVariant], runs: Runs, costs: Mapping[str, StepCost], grid: AblationGrid) -> dict[str, Any]:
    """Everything about an ablation in plain values, for results.json."""
    compared = compare(planned, runs, grid)
    sizes = {plan.variant.name: plan.parameters for plan in planned}
    return {
        "budget": grid.budget,
        "metric": grid.metric,
        "variance": grid.variance,
        "cost": list(grid.cost),
        "seeds": list(grid.seeds),
        "variants": [
            {
                **_row(plan, runs.get(plan.variant.name, {}), costs, compared.get(plan.variant.name), grid),
                "size_ratio": plan.parameters / sizes[plan.variant.compared_with] if plan.variant.compared_with else None,
            }
            for plan in planned
        ],
    }


def _row(
    plan: PlannedVariant, of: Mapping[int, RunResult], costs: Mapping[str, StepCost], compared: VariantComparison | None, grid: AblationGrid
) -> dict[str, Any]:
    variant, own, base = plan.variant, costs.get(plan.variant.name), costs.get(plan.variant.compared_with)
    found = figures(of, grid.metric)
    return {
        **variant.model_dump(mode="json"),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops,
        "steps": plan.config.train.steps,
        "spent": spent(grid.budget, plan.config, own.step_seconds if own else None),
        "mean": statistics.fmean(found.values()) if found else None,
        "deviation": statistics.stdev(found.values()) if len(found) > 1 else None,
        "cost": asdict(own) if own else None,
        "time_ratio": own.seconds_per_token / base.seconds_per_token if own and base else None,
        "memory_ratio": own.peak_bytes / base.peak_bytes if own and base else None,
        "effect": asdict(compared.effect) if compared and compared.effect else None,
        "corrected_p": compared.corrected if compared else None,
        "verdict": compared.verdict if compared else "",
        "runs": {str(seed): asdict(run) for seed, run in sorted(of.items())},
    }
