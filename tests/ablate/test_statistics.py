"""Effects, intervals and p-values against scipy, closed forms and simulation; verdicts against what they claim."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from andromeda.ablate.statistics import Effect, VariancePrior, effect, holm, inverse_trigamma, moderated, shared_prior, verdict

VARIANT = {0: 3.10, 1: 3.02, 2: 3.15, 3: 3.08}
BASE = {0: 3.20, 1: 3.11, 2: 3.21, 3: 3.25}


def test_shared_seeds_give_scipys_paired_test() -> None:
    found = effect(VARIANT, BASE)
    theirs = stats.ttest_rel(list(VARIANT.values()), list(BASE.values()))
    interval = theirs.confidence_interval(0.95)
    assert found.paired
    assert found.mean == pytest.approx(-0.105)
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, interval.low, interval.high), rel=1e-9)
    assert found.spread == pytest.approx(np.std([-0.10, -0.09, -0.06, -0.17], ddof=1))


def test_seeds_that_one_side_lacks_are_left_out_of_pairs() -> None:
    assert effect(VARIANT | {9: 99.0}, BASE | {7: -99.0}) == effect(VARIANT, BASE)


def test_other_seeds_give_welchs_test() -> None:
    found = effect({10 + seed: loss for seed, loss in VARIANT.items()}, BASE)
    theirs = stats.ttest_ind(list(VARIANT.values()), list(BASE.values()), equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert not found.paired
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, interval.low, interval.high), rel=1e-9)


def test_three_pairs_by_hand() -> None:
    found = effect({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    # mean 2, deviation 1, error 1/sqrt(3); the 97.5 % point of t with two degrees of freedom is 4.302652729749464
    assert found.low == pytest.approx(2 - 4.302652729749464 / math.sqrt(3))
    # with two degrees of freedom the tail of t is (1 - t / sqrt(t² + 2)) / 2
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_one_seed_has_no_interval_and_equal_runs_no_difference() -> None:
    alone = effect({0: 3.0}, BASE)
    assert (alone.mean, alone.low, alone.p) == (pytest.approx(-0.2), None, None)
    same = effect(BASE, BASE)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    differences = draw.normal(0.3, 1.0, (4000, 3))
    zero = dict.fromkeys(range(3), 0.0)
    covered = sum(found.low < 0.3 < found.high for row in differences if (found := effect(dict(enumerate(row)), zero)).low is not None)
    assert covered / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def by_definition(p_values: list[float]) -> list[float]:
    """Holm: hypothesis i is rejected at the level a when all smaller p-values are, and p_i <= a / (m - rank)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    for rank, index in enumerate(order):
        adjusted[index] = min(1.0, max((len(order) - r) * p_values[order[r]] for r in range(rank + 1)))
    return adjusted


@given(st.lists(st.floats(0.0, 1.0), max_size=8))
def test_holm_is_its_definition(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(by_definition(p_values))


def test_holm_of_a_textbook_and_of_missing_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.03, None, 0.01]) == [0.03, None, 0.02]


@pytest.mark.parametrize("value", [1e-4, 0.01, 0.5, 1.0, 7.0, 1e4])
def test_inverse_trigamma(value: float) -> None:
    assert float(special.polygamma(1, inverse_trigamma(value))) == pytest.approx(value, rel=1e-8)


def test_the_shared_variance_is_found_again() -> None:
    draw = np.random.default_rng(1)
    dof, prior_dof, variance = 2, 6.0, 0.04
    true = prior_dof * variance / draw.chisquare(prior_dof, 40_000)
    prior = shared_prior(list(true * draw.chisquare(dof, 40_000) / dof), dof)
    assert prior is not None
    assert prior.dof == pytest.approx(prior_dof, rel=0.1)
    assert prior.variance == pytest.approx(variance, rel=0.05)


def test_equal_variances_are_pooled_whole_and_few_variants_not_at_all() -> None:
    draw = np.random.default_rng(2)
    prior = shared_prior([0.5] * 6, 2)
    assert prior is not None
    assert math.isinf(prior.dof)
    assert moderated(9.0, 2, prior) == (prior.variance, math.inf)
    assert shared_prior(list(draw.chisquare(2, 3)), 2) is None


def test_a_moderated_variance_lies_between_its_own_and_the_shared_one() -> None:
    assert moderated(1.0, 2.0, VariancePrior(6.0, 0.2)) == pytest.approx((0.4, 8.0))


def test_moderated_p_values_are_uniform_where_nothing_differs() -> None:
    draw = np.random.default_rng(3)
    deviations = np.sqrt(5.0 / draw.chisquare(5.0, 3000))
    rows = draw.normal(0.0, 1.0, (3000, 3)) * deviations[:, None]
    zero = dict.fromkeys(range(3), 0.0)
    prior = shared_prior([float(np.var(row, ddof=1)) for row in rows], 2)
    p_values = [effect(dict(enumerate(row)), zero, prior).p for row in rows]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


@pytest.mark.parametrize(
    ("low", "high", "corrected", "word"),
    [
        (-0.2, -0.1, 0.01, "better"),
        (-0.2, -0.1, 0.2, "perhaps better"),
        (0.1, 0.2, 0.01, "worse"),
        (0.1, 0.2, 0.06, "perhaps worse"),
        (-0.1, 0.2, 0.5, "no difference shown"),
        (0.0, 0.0, 1.0, "no difference shown"),
        (None, None, None, "one seed: no verdict"),
    ],
)
def test_the_verdict_follows_the_interval(low: float | None, high: float | None, corrected: float | None, word: str) -> None:
    for mean in (-5.0, 5.0):  # which says nothing by itself
        assert verdict(Effect(mean, 3, True, 0.1, low, high, 0.01), corrected) == word


def test_a_permutation_test_agrees_about_a_clear_difference() -> None:
    differences = [-0.11, -0.09, -0.13, -0.10, -0.12, -0.08, -0.14, -0.10]
    signs = itertools.product((1, -1), repeat=8)
    extreme = sum(abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= abs(sum(differences)) - 1e-12 for sign in signs)
    found = effect(dict(enumerate(differences)), dict.fromkeys(range(8), 0.0))
    assert found.p is not None
    assert extreme / 2**8 < 0.01
    assert found.p < 0.01
