"""Verdicts on steps, and that they do not depend on interruptions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.config.train import SpikeGuardConfig
from andromeda.train.callbacks.spike_guard import MIN_HISTORY, LossSpikeGuard

numbers = st.one_of(st.floats(0.01, 100.0), st.sampled_from([math.nan, math.inf, 0.0, 1e30]))


@given(st.lists(st.tuples(numbers, numbers), max_size=40), st.integers(1, 12), st.floats(1.5, 30.0))
def test_verdicts_follow_the_definition(steps: list[tuple[float, float]], history: int, spike: float) -> None:
    """Bad is: not finite, or above `spike` times the median of the last `history` good norms, once enough are known."""
    guard = LossSpikeGuard(SpikeGuardConfig(history=history, spike=spike))
    good: list[float] = []
    for number, (loss, norm) in enumerate(steps):
        recent = good[-history:]
        known = len(recent) >= min(MIN_HISTORY, history)
        spiked = known and norm > spike * np.median(recent) > 0
        bad = not math.isfinite(loss) or not math.isfinite(norm) or bool(spiked)
        assert (guard.check(loss, norm, (number, number + 1)) is not None) == bad
        assert guard.healthy == (not bad)
        if not bad:
            good.append(norm)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.data())
def test_state_survives_json(steps: list[tuple[float, float]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(steps)))
    whole = LossSpikeGuard(SpikeGuardConfig(history=9))
    verdicts = [whole.check(loss, norm, (i, i + 1)) for i, (loss, norm) in enumerate(steps)]
    first, second = LossSpikeGuard(SpikeGuardConfig(history=9)), LossSpikeGuard(SpikeGuardConfig(history=9))
    parts = [first.check(loss, norm, (i, i + 1)) for i, (loss, norm) in enumerate(steps[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    parts += [second.check(loss, norm, (i, i + 1)) for i, (loss, norm) in enumerate(steps[cut:], cut)]
    assert parts == verdicts
    assert second.state_dict() == whole.state_dict()
    assert second.must_roll_back == whole.must_roll_back


def test_off_judges_nothing() -> None:
    guard = LossSpikeGuard(SpikeGuardConfig(enabled=False))
    assert [guard.check(math.nan, math.inf, (0, 1)) for _ in range(10)] == [None] * 10
    assert not guard.must_roll_back


def test_patience_and_rows_passed_over() -> None:
    guard = LossSpikeGuard(SpikeGuardConfig(patience=3, rollbacks=2))
    guard.check(1.0, 1.0, (0, 4))
    for first in (4, 8, 12):
        assert not guard.must_roll_back
        guard.check(math.nan, 1.0, (first, first + 4))
    assert guard.must_roll_back
    assert not guard.out_of_rollbacks
    guard.rollbacks, guard.skipped_rows = guard.after_rollback()
    assert [guard.next_row(row) for row in (0, 3, 4, 8, 15, 16, 99)] == [0, 3, 16, 16, 16, 16, 99]
    assert guard.rollbacks == 1
    guard.rollbacks += 1
    assert guard.out_of_rollbacks


@pytest.mark.parametrize("patience", [1, 2])
def test_a_good_step_ends_the_streak(patience: int) -> None:
    guard = LossSpikeGuard(SpikeGuardConfig(patience=patience + 1))
    for _ in range(5):
        for _ in range(patience):
            guard.check(math.inf, 1.0, (0, 1))
        assert not guard.must_roll_back
        guard.check(1.0, 1.0, (0, 1))
        assert guard.healthy
