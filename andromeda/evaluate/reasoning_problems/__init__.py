"""Reasoning in small: each task as it is in training's probes, and a harder one of the same kind, out of distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

from andromeda.data.reasoning_tasks import ReasoningTask
from andromeda.evaluate.reasoning_problems.dyck import Dyck
from andromeda.evaluate.reasoning_problems.harder import LongInduction, LongRecall, ThreeHops, TwoDigits
from andromeda.evaluate.reasoning_problems.parity import Parity
from andromeda.train.callbacks.probes import PROBE_TASKS


class Pair(NamedTuple):
    """A task and its harder form."""

    usual: ReasoningTask[Any]
    harder: ReasoningTask[Any]


REASONING: dict[str, Pair] = {
    "digits": Pair(PROBE_TASKS["arithmetic"], TwoDigits()),
    "recall": Pair(PROBE_TASKS["recall"], LongRecall()),
    "induction": Pair(PROBE_TASKS["induction"], LongInduction()),
    "multihop": Pair(PROBE_TASKS["multihop"], ThreeHops()),
    "parity": Pair(Parity(6), Parity(20)),
    "dyck": Pair(Dyck(2), Dyck(6)),
}
"""By name."""

__all__ = ["REASONING", "Pair"]
