"""Statistics of differences between two sets of runs: effect, confidence interval, p-value, and correction for multiple tests.

Runs with the same seed see the same batches in the same order, so differences are taken seed by seed where both sides have
it (paired t-test), else between the sets (Welch's t-test). With three seeds a variance is poorly known. Where many variants are
compared in one grid, `variance = "shared"` shrinks each variant's variance towards that of all: the moderated t of Smyth (2004,
Statistical Applications in Genetics and Molecular Biology 3, 3), made for many comparisons with few repeats each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL = 0.95
"""Of every interval."""
MIN_SHARED_VARIANTS = 4
"""Fewest variants from which a shared variance is estimated."""

Losses = Mapping[int, float]
"""Final figure by seed."""


@dataclass(frozen=True)
class Effect:
    """Variant minus what it is compared with; below zero is better."""

    mean: float
    seeds: int
    """Pairs, or runs of the smaller side."""
    paired: bool
    spread: float | None = None
    """Standard deviation of the differences (paired), or of the difference of two single runs; None with one seed."""
    low: float | None = None
    high: float | None = None
    """Interval of 95 %."""
    p: float | None = None


@dataclass(frozen=True)
class VariancePrior:
    """Prior distribution of a variant's variance, estimated from all variants."""

    dof: float
    """Its degrees of freedom; infinite if the variances do not differ more than by chance."""
    variance: float


def effect(variant: Losses, base: Losses, prior: VariancePrior | None = None) -> Effect:
    """The difference between two sets of runs, each with one finite figure at least."""
    shared = sorted(variant.keys() & base.keys())
    if len(shared) >= 2 or (shared and min(len(variant), len(base)) < 2):
        return _paired([variant[seed] - base[seed] for seed in shared], prior)
    return _welch(list(variant.values()), list(base.values()))


def _paired(differences: list[float], prior: VariancePrior | None) -> Effect:
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Effect(mean, n, True)
    variance, dof = statistics.variance(differences), float(n - 1)
    if prior is not None:
        variance, dof = moderated(variance, dof, prior)
    low, high, p = t_interval(mean, math.sqrt(variance / n), dof)
    return Effect(mean, n, True, statistics.stdev(differences), low, high, p)


def _welch(variant: list[float], base: list[float]) -> Effect:
    mean, n = statistics.fmean(variant) - statistics.fmean(base), min(len(variant), len(base))
    if n < 2:
        return Effect(mean, n, False)
    parts = [statistics.variance(side) / len(side) for side in (variant, base)]
    spread = math.sqrt(statistics.variance(variant) + statistics.variance(base))
    if not sum(parts):
        return Effect(mean, n, False, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_ind(variant, base, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return Effect(mean, n, False, spread, float(interval.low), float(interval.high), float(test.pvalue))


def t_interval(mean: float, error: float, dof: float) -> tuple[float, float, float]:
    """Ends of the 95 % interval and two-sided p-value of a mean with this standard error; `dof` may be infinite."""
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    t = stats.norm if math.isinf(dof) else stats.t(dof)
    reach = float(t.ppf((1 + LEVEL) / 2)) * error
    return mean - reach, mean + reach, float(2 * t.sf(abs(mean) / error))


def moderated(variance: float, dof: float, prior: VariancePrior) -> tuple[float, float]:
    """A variant's variance shrunk towards the prior, and its degrees of freedom."""
    if math.isinf(prior.dof):
        return prior.variance, prior.dof
    return (prior.dof * prior.variance + dof * variance) / (prior.dof + dof), prior.dof + dof


def shared_prior(variances: Sequence[float], dof: float) -> VariancePrior | None:
    """Fit the scaled F distribution that variances with `dof` degrees of freedom come from; None for too few variants.

    Smyth (2004), section 6.2: log s² has the mean log s0² + ψ(d/2) - ψ(d0/2) + log(d0/d) and the variance ψ'(d/2) + ψ'(d0/2).
    """
    known = [v for v in variances if v > 0]
    if len(known) < MIN_SHARED_VARIANTS:
        return None
    centered = np.log(known) - special.digamma(dof / 2) + math.log(dof / 2)
    excess = float(np.var(centered, ddof=1) - special.polygamma(1, dof / 2))
    if excess <= 0:
        return VariancePrior(math.inf, float(np.exp(centered.mean())))
    prior_dof = 2 * inverse_trigamma(excess)
    return VariancePrior(prior_dof, float(np.exp(centered.mean() + special.digamma(prior_dof / 2) - math.log(prior_dof / 2))))


def inverse_trigamma(value: float) -> float:
    """The x > 0 with ψ'(x) = value, by Newton's method on 1/ψ', which is nearly linear."""
    x = 0.5 + 1 / value
    for _ in range(50):
        first = float(special.polygamma(1, x))
        step = first * (1 - first / value) / float(special.polygamma(2, x))
        x += step
        if abs(step) < 1e-12 * x:
            break
    return x


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for multiple tests (Holm 1979): the k-th smallest of m times m - k + 1, made monotonic."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * (p_values[index] or 0.0)))
        corrected[index] = highest
    return corrected


def verdict(found: Effect, corrected: float | None) -> str:
    """The verdict that the interval and the corrected p-value support."""
    if found.low is None or found.high is None:
        return "one seed: no verdict"
    if found.low <= 0 <= found.high:
        return "no difference shown"
    word = "better" if found.high < 0 else "worse"
    return word if corrected is not None and corrected < 1 - LEVEL else f"perhaps {word}"
